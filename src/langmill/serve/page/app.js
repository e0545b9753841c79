// The page: which conversation is open, what is sent, and what the buttons around it do.
import { apiKey, call, events, file, Problem } from "./api.js";
import { buildControls, fill, values } from "./controls.js";
import { $, ask, h, memory, tell, translate } from "./dom.js";
import { buildList, draw as drawList, refresh } from "./list.js";
import { language, number, t } from "./strings.js";
import { drawThread, fit, Live, notice, Tree } from "./thread.js";

// runs: of each conversation that is being answered, also in the background: {controller, live, tree, below}.
const page = { id: null, title: "", tree: new Tree(), leaf: null, runs: new Map(), models: null };
const LAST_WORDS = [30, 100, 300, 600, 1000, 2000]; // ms: how often to look for what was kept of a stopped answer
const NARROW = matchMedia("(max-width: 900px)");

const running = () => page.runs.get(page.id);

const deeds = {
  busy: () => running() !== undefined,
  conversation: () => page.id,
  problem,
  retry: (message) => answer(`/messages/${message.number}/retry`, {},
    message.role === "user" ? message.number : message.parent),
  edit: (message, text) => say(text, message.parent),
  turn(leaf, parent, step) {
    if (running()) return;
    page.leaf = leaf;
    show();
    const turned = page.tree.path(leaf).find((one) => one.parent === parent);
    const place = $("thread").querySelector(`[data-number="${turned.number}"] .versions`);
    (place.querySelector(`[data-step="${step}"]:not(:disabled)`) ?? place.querySelector("button:not(:disabled)")).focus();
  },
};

function show() {
  const empty = page.tree.messages.size === 0 && !running();
  $("empty").hidden = !empty;
  $("thread").hidden = empty;
  if (empty) drawEmpty();
  drawThread(page.tree, page.leaf, deeds);
  if (running()) $("thread").append(running().live.node);
  entitle();
  $("menu").hidden = page.id === null;
}

function drawEmpty() {
  const model = $("model").value;
  const starters = [1, 2, 3, 4].map((n) => h("button", { type: "button", class: "starter", onclick: () => {
    $("say").value = t(`starter_${n}`);
    fit($("say"));
    $("say").focus();
  } }, t(`starter_${n}`)));
  $("empty").replaceChildren(...(page.models?.length
    ? [h("h2", {}, t("empty_title")), h("p", {}, t("empty_text", { model })),
      h("div", { class: "starters", role: "group", "aria-label": t("starters") }, ...starters),
      h("p", { class: "quiet keys" }, t("shortcuts"))]
    : [h("h2", {}, "Langmill"), h("p", {}, page.models ? t("no_models") : "")]));
}

function problem(error, again = null) {
  if (error.status === 401) return askKey();
  $("empty").hidden = true;
  $("thread").hidden = false;
  $("thread").querySelector(".notice")?.remove();
  $("thread").append(notice(error instanceof Problem ? error.message : String(error), again, "problem"));
  if (!(error instanceof Problem)) console.error(error);
  toEnd(true);
}

// --- what is open

async function open() {
  const id = location.hash.slice(1) || null;
  Object.assign(page, { id, title: "", tree: new Tree(), leaf: null });
  $("context").textContent = "";
  drawer("side", false);
  const run = running();
  if (id) {
    let found;
    try {
      found = await call(`/api/conversations/${id}`);
    } catch (error) {
      if (page.id !== id) return;
      if (error.status === 404) history.replaceState(null, "", location.pathname);
      page.id = null;
      show();
      return problem(error);
    }
    if (page.id !== id) return; // another one was opened meanwhile
    page.title = found.title;
    page.tree = run?.tree ?? new Tree(found.messages);
    page.leaf = run?.below ?? page.tree.newest;
    const last = page.tree.path(page.leaf).filter((one) => one.role === "user").at(-1);
    if (last) {
      fill({ ...last.settings, likely: values().likely });
      if (page.models?.some((one) => one.id === last.model)) $("model").value = last.model;
    }
  }
  show();
  buttons();
  drawList();
  toEnd(true);
}

async function loadModels() {
  const found = (await call("/v1/models")).data.filter((one) => one.does.includes("chat"));
  page.models = found;
  $("model").replaceChildren(...found.map((one) => h("option", { value: one.id }, one.id)));
  const kept = memory.get("model");
  if (found.some((one) => one.id === kept)) $("model").value = kept;
  $("send").disabled = found.length === 0;
}

// --- asking

async function say(content, parent) {
  if (!page.id) {
    try {
      page.id = (await call("/api/conversations", { method: "POST", body: {} })).id;
    } catch (error) {
      return problem(error);
    }
    history.replaceState(null, "", `#${page.id}`);
  }
  return answer("/messages", { content, parent }, parent);
}

// Ask for an answer and show it as it comes; `below`: the message behind which it, or the user's message, goes.
async function answer(path, body, below) {
  if (running()) return;
  const how = values();
  if (how.wrong) {
    drawer("controls", true);
    return how.wrong.focus();
  }
  const { id, tree } = page;
  const run = { controller: new AbortController(), live: new Live(atEnd, toEnd), tree, below };
  const known = tree.newest ?? 0;
  page.runs.set(id, run);
  page.leaf = below;
  show();
  buttons();
  toEnd(true);
  tell(t("answering"));
  let failure = null;
  try {
    await follow(run, id, path, { ...body, ...how, model: $("model").value });
  } catch (error) {
    failure = error;
    await lastWords(id, run, known);
  }
  page.runs.delete(id);
  await named(id).catch(() => {});
  if (page.tree !== tree) return; // another conversation was opened meanwhile
  const end = atEnd();
  page.leaf = tree.messages.has(run.below) ? tree.leaf(run.below) : tree.newest;
  if (failure?.name === "AbortError") tell(t("stopped"));
  show();
  buttons();
  if (failure && failure.name !== "AbortError") problem(failure, retryOf(tree, run.below));
  else if (end) toEnd(true);
}

// Take in what the server tells of an answer until it is done.
async function follow(run, id, path, body) {
  let done = false;
  for await (const told of events(`/api/conversations/${id}${path}`, body, run.controller.signal)) {
    const open = page.tree === run.tree;
    if (told.user) {
      run.tree.add(told.user);
      run.below = told.user.number;
      if (open) page.leaf = run.below;
      if (open) show();
      if (!page.title) named(id).catch(() => {});
      if (open && body.content !== undefined && $("say").value.trim() === body.content.trim()) clearField();
    } else if (told.done) {
      done = true;
      run.tree.add(told.done);
      tell(t("answered", { count: t("count", { tokens: number(told.done.tokens) }) }));
      if (open) showContext(told.context);
    } else run.live.push(told);
  }
  if (!done) throw new Problem(t("broken"));
}

function retryOf(tree, below) {
  const message = tree.messages.get(below);
  return message?.role === "user" ? () => deeds.retry(message) : null;
}

// What the server kept of an answer that was broken off: it does so once it sees that nobody listens.
async function lastWords(id, { tree, live }, known) {
  for (const wait of LAST_WORDS) {
    await new Promise((resolve) => setTimeout(resolve, wait));
    const found = await call(`/api/conversations/${id}`).catch(() => null);
    found?.messages.forEach((message) => tree.add(message));
    if (!found || !live.tokens || found.messages.some((one) => one.number > known && one.role === "assistant")) return;
  }
}

// The list anew, and with it the title that the server gave.
async function named(id) {
  await refresh();
  const title = $("list").querySelector(`a[href="#${id}"]`)?.textContent;
  if (page.id !== id || !title) return;
  page.title = title;
  entitle();
}

function entitle() {
  $("title").textContent = page.title || t("untitled");
  document.title = page.title ? `${page.title} – Langmill` : "Langmill";
}

function showContext({ used, window }) {
  $("context").textContent = t("context", { used: number(used), window: number(window) });
}

function clearField() {
  $("say").value = "";
  fit($("say"));
}

function buttons() {
  const busy = running() !== undefined;
  const focused = document.activeElement === $("send") || document.activeElement === $("stop");
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  if (focused) $("say").focus();
}

function atEnd() {
  const box = $("scroll");
  return box.scrollHeight - box.scrollTop - box.clientHeight < 80;
}

function toEnd(wanted) {
  if (wanted) $("scroll").scrollTop = $("scroll").scrollHeight;
}

// --- around it

function drawer(name, open) {
  const box = $(name);
  const opener = $(`${name}-open`);
  if (name === "controls") box.hidden = !open;
  else {
    box.classList.toggle("open", open);
    box.inert = NARROW.matches && !open;
  }
  opener.setAttribute("aria-expanded", String(open));
  $("veil").hidden = !(NARROW.matches && (!$("controls").hidden || $("side").classList.contains("open")));
  return opener;
}

function bind(name) {
  $(`${name}-open`).addEventListener("click", () => {
    const open = $(`${name}-open`).getAttribute("aria-expanded") !== "true";
    drawer(name, open);
    if (open) $(name === "side" ? "new" : "how-system").focus();
  });
  $(`${name}-close`).addEventListener("click", () => drawer(name, false).focus());
}

async function askKey() {
  const key = await ask({ title: t("key_title"), text: t("key_text"), label: t("key_here"), type: "password", yes: t("save") });
  if (key === null) return;
  apiKey.set(key);
  await start();
}

async function exportAs(form) {
  $("menu").open = false;
  const leaf = form === "markdown" && page.leaf ? `&leaf=${page.leaf}` : "";
  const { blob, name } = await file(`/api/conversations/${page.id}/export?form=${form}${leaf}`);
  const link = h("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

async function rename() {
  $("menu").open = false;
  const { id } = page;
  const title = await ask({ title: t("rename"), label: t("rename_text"), value: page.title, yes: t("save") });
  if (!title) return;
  await call(`/api/conversations/${id}`, { method: "PATCH", body: { title } });
  if (page.id === id) page.title = title;
  entitle();
  await refresh();
}

async function remove() {
  $("menu").open = false;
  const { id } = page;
  const text = t("delete_text", { title: page.title || t("untitled") });
  if (await ask({ title: t("delete_title"), text, yes: t("delete"), danger: true }) === null) return;
  page.runs.get(id)?.controller.abort();
  await call(`/api/conversations/${id}`, { method: "DELETE" });
  await refresh();
  fresh();
}

function fresh() {
  if (location.hash) location.hash = "";
  else open();
  history.replaceState(null, "", location.pathname);
  drawer("side", false);
  $("say").focus();
}

function choose(name, apply) {
  const stored = memory.get(name);
  if (stored) $(name).value = stored;
  $(name).addEventListener("change", () => { memory.set(name, $(name).value); apply($(name).value); });
}

function listen() {
  const on = (id, deed) => $(id).addEventListener("click", () => Promise.resolve(deed()).catch(problem));
  on("new", fresh);
  on("stop", () => running()?.controller.abort());
  on("rename", rename);
  on("delete", remove);
  on("as-json", () => exportAs("json"));
  on("as-markdown", () => exportAs("markdown"));
  on("key", askKey);
  on("veil", () => { drawer("side", false); drawer("controls", false); });
  bind("side");
  bind("controls");
  choose("theme", (theme) => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
  });
  choose("language", () => location.reload());
  $("language").value = language;
  $("model").addEventListener("change", () => { memory.set("model", $("model").value); if (!$("empty").hidden) drawEmpty(); });
  $("say").addEventListener("input", () => fit($("say")));
  $("say").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return; // an IME's
    event.preventDefault();
    $("composer").requestSubmit();
  });
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("say").value;
    if (!text.trim() || running() || !page.models?.length) return;
    const last = page.tree.messages.get(page.leaf); // a message without an answer is said anew, beside it
    say(text, last?.role === "user" ? last.parent : page.leaf);
  });
  addEventListener("hashchange", () => open().catch(problem));
  NARROW.addEventListener("change", () => drawer("side", false));
  document.addEventListener("click", (event) => { if (!event.target.closest("#menu")) $("menu").open = false; });
  document.addEventListener("keydown", keys);
}

function keys(event) {
  if (event.defaultPrevented || $("ask").open) return;
  if (event.key === "/" && !event.target.closest("input, textarea, select") && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    $("say").focus();
  } else if (event.key === "Escape") {
    if (running()) running().controller.abort();
    else if ($("menu").open) { $("menu").open = false; $("menu").querySelector("summary").focus(); }
    else if (!$("controls").hidden) drawer("controls", false).focus();
    else if ($("side").classList.contains("open")) drawer("side", false).focus();
  }
}

async function start() {
  $("key").hidden = !apiKey.get();
  try {
    await loadModels();
    await open();
    await refresh();
  } catch (error) {
    show();
    problem(error, error.status === 401 ? null : start);
  }
}

document.documentElement.lang = language;
translate(document);
buildControls();
buildList(problem);
listen();
drawer("side", false);
await start();
document.documentElement.dataset.ready = "yes";
