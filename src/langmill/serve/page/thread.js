// The messages of a conversation: one branch of their tree, and the answer that is being written.
import { $, copy, h, iconButton } from "./dom.js";
import { number, t } from "./strings.js";
import { showTokens } from "./tokens.js";

export class Tree {
  constructor(messages = []) {
    this.messages = new Map();
    messages.forEach((message) => this.add(message));
  }

  add(message) { this.messages.set(message.number, message); }

  get newest() { return Math.max(0, ...this.messages.keys()) || null; }

  below(parent) { return [...this.messages.values()].filter((one) => one.parent === parent); }

  // The newest message that can be reached from this one.
  leaf(from) {
    let last = from;
    for (let next = this.below(from); next.length; next = this.below(last)) last = next.at(-1).number;
    return last;
  }

  path(leaf) {
    const found = [];
    for (let at = this.messages.get(leaf); at; at = this.messages.get(at.parent)) found.unshift(at);
    return found;
  }
}

// deeds: what the buttons do: {edit(message, text), retry(message), turn(number), conversation(), problem(error)}.
export function drawThread(tree, leaf, deeds) {
  const path = tree.path(leaf);
  $("thread").replaceChildren(...path.map((message) => turn(tree, message, deeds)));
  if (path.at(-1)?.role === "user" && !deeds.busy()) {
    $("thread").append(notice(t("unanswered"), () => deeds.retry(path.at(-1))));
  }
}

export function notice(said, again, kind = "quiet") {
  const text = said.charAt(0).toUpperCase() + said.slice(1);
  return h("div", { class: `notice ${kind}`, role: kind === "problem" ? "alert" : null }, h("span", {}, text),
    again && h("button", { type: "button", class: "plain", onclick: again }, t("retry")));
}

function turn(tree, message, deeds) {
  const user = message.role === "user";
  const body = h("div", { class: "body", dir: "auto" });
  const article = h("article", { class: `turn ${message.role}`, "data-number": message.number },
    h("h2", { class: "unseen" }, user ? t("you") : message.model ?? t("assistant")), body,
    h("footer", {},
      versions(tree, message, deeds),
      user && iconButton("edit", t("edit"), () => edit(article, message, deeds)),
      iconButton("copy", t("copy"), (event) => copy(message.content, event.currentTarget)),
      !user && iconButton("retry", t("retry"), () => deeds.retry(message)),
      message.likely && iconButton("tokens", t("tokens"), (event) => toggle(event.currentTarget, body, message, deeds),
        { "aria-pressed": "false" }),
      !user && h("span", { class: "quiet facts" }, facts(message))));
  fillBody(body, message);
  return article;
}

function fillBody(body, message) {
  if (message.role === "user") body.textContent = message.content;
  else setHtml(body, message.html);
}

// The server made this HTML from Markdown and let nothing through but text and its marks.
export function setHtml(node, html) {
  node.innerHTML = html;
  dress(node);
}

// Code gets its language and a button, wide tables room to scroll, links a tab of their own.
export function dress(node) {
  for (const pre of node.querySelectorAll("pre:not(.dressed)")) {
    const code = pre.querySelector("code");
    const name = /language-(\S+)/.exec(code?.className ?? "")?.[1];
    pre.classList.add("dressed");
    pre.tabIndex = 0;
    const box = h("div", { class: "code" },
      h("div", { class: "row" }, h("span", { class: "quiet" }, name ?? t("code")),
        iconButton("copy", t("copy"), (event) => copy(pre.textContent, event.currentTarget))));
    pre.replaceWith(box);
    box.append(pre);
  }
  for (const table of node.querySelectorAll("table:not(.dressed)")) {
    table.classList.add("dressed");
    const box = h("div", { class: "wide-table", tabindex: 0 });
    table.replaceWith(box);
    box.append(table);
  }
  for (const link of node.querySelectorAll("a")) link.target = "_blank";
}

function facts(message) {
  const parts = [message.model];
  if (message.tokens !== null) {
    parts.push(message.tokens === 1 ? t("count_one") : t("count", { tokens: number(message.tokens) }));
    if (message.seconds > 0) parts.push(t("speed", { speed: number(message.tokens / message.seconds, 1) }));
  }
  if (message.finish !== "stop") parts.push(t(`finish_${message.finish}`));
  return parts.filter(Boolean).join(" · ");
}

// ‹ 2 of 3 ›
function versions(tree, message, deeds) {
  const all = tree.below(message.parent);
  if (all.length < 2) return null;
  const at = all.indexOf(message);
  const go = (step) => deeds.turn(tree.leaf(all[at + step].number), message.parent, step);
  return h("span", { class: "versions", role: "group", "aria-label": t("version_at", { at: at + 1, all: all.length }) },
    iconButton("left", t("before"), () => go(-1), { disabled: at === 0, "data-step": -1 }),
    h("span", {}, t("version", { at: at + 1, all: all.length })),
    iconButton("right", t("after"), () => go(1), { disabled: at === all.length - 1, "data-step": 1 }));
}

function edit(article, message, deeds) {
  const field = h("textarea", { "aria-label": t("edit_label"), rows: 3, dir: "auto" });
  field.value = message.content;
  const back = () => { article.classList.remove("editing"); form.replaceWith(body, footer); };
  const [body, footer] = [article.querySelector(".body"), article.querySelector("footer")];
  const form = h("form", { class: "edit", onsubmit: (event) => {
    event.preventDefault();
    if (field.value.trim()) deeds.edit(message, field.value);
  } }, field, h("div", { class: "row end" },
    h("button", { type: "button", class: "plain", onclick: back }, t("cancel")),
    h("button", { type: "submit", class: "solid" }, t("edit_send"))));
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); back(); article.querySelector("button").focus(); }
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.target === field) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  article.classList.add("editing");
  body.replaceWith(form);
  footer.remove();
  fit(field);
  field.addEventListener("input", () => fit(field));
  field.focus();
}

export function fit(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

async function toggle(button, body, message, deeds) {
  const open = button.getAttribute("aria-pressed") !== "true";
  try {
    if (open) await showTokens(body, deeds.conversation(), message.number);
    else fillBody(body, message);
  } catch (error) {
    deeds.problem(error);
    return;
  }
  button.setAttribute("aria-pressed", String(open));
  button.setAttribute("aria-label", t(open ? "text" : "tokens"));
  button.title = t(open ? "text" : "tokens");
}

// The answer that is being written: finished blocks as HTML, the rest as plain text. It is drawn once a frame, whatever
// came meanwhile; what `before` gives is handed to `after`.
export class Live {
  constructor(before, after) {
    this.blocks = h("div", { class: "blocks" });
    this.rest = h("div", { class: "rest", "aria-hidden": "true" }, "");
    this.facts = h("span", { class: "quiet facts" }, t("waiting"));
    this.node = h("article", { class: "turn assistant live", "aria-busy": "true" },
      h("div", { class: "body", dir: "auto" }, this.blocks, this.rest), h("footer", {}, this.facts));
    Object.assign(this, { before, after, html: "", text: "", tokens: 0, began: performance.now(), frame: null });
  }

  push(told) {
    if (told.html) {
      this.html += told.html;
      this.text = told.rest;
    } else this.text += told.text;
    this.tokens = told.tokens;
    this.frame ??= requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.frame = null;
    const end = this.node.isConnected && this.before();
    if (this.html) {
      const part = h("template");
      part.innerHTML = this.html;
      this.html = "";
      this.blocks.append(part.content);
      dress(this.blocks);
    }
    this.rest.textContent = this.text;
    const speed = this.tokens / ((performance.now() - this.began) / 1000);
    const count = t("count", { tokens: number(this.tokens) });
    this.facts.textContent = `${count} · ${t("speed", { speed: number(speed, 1) })}`;
    this.after(end);
  }
}
