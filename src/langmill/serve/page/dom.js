// Small helpers over the document.
import { t } from "./strings.js";

const PATHS = {
  menu: "M4 7h16M4 12h16M4 17h16",
  close: "M6 6l12 12M18 6L6 18",
  plus: "M12 5v14M5 12h14",
  dots: "M5 12h.01M12 12h.01M19 12h.01",
  sliders: "M4 8h9M17 8h3M4 16h3M11 16h9M13 6v4M7 14v4",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M8 8h8v8H8z",
  key: "M14 10a4 4 0 1 1-1.2-2.8A4 4 0 0 1 14 10zM13.5 12l6.5 6.5M17 15.500l2-2",
  copy: "M9 9h10v10H9zM15 9V5H5v10h4",
  check: "M5 12.500l4.500 4.500L19 7.500",
  retry: "M19 12a7 7 0 1 1-2.300-5.200M19 4v4h-4",
  edit: "M5 19l1-4L16 5l3 3L9 18z",
  tokens: "M4 19V11M9.300 19V6M14.700 19v-5M20 19V9",
  left: "M14 6l-6 6 6 6",
  right: "M10 6l6 6-6 6",
};

export const $ = (id) => document.getElementById(id);

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

// h("button", {class: "plain", onclick: f}, "text", node, …); null children are left out.
export function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export function iconButton(name, label, onclick, more = {}) {
  return h("button", { type: "button", class: "icon", "aria-label": label, title: label, onclick, ...more }, icon(name));
}

// The words of the markup, in the page's language.
export function translate(root) {
  for (const node of root.querySelectorAll("[data-t]")) node.textContent = t(node.dataset.t);
  for (const node of root.querySelectorAll("[data-t-label]")) {
    node.setAttribute("aria-label", t(node.dataset.tLabel));
    if (node.matches("button, summary")) node.title = t(node.dataset.tLabel);
  }
  for (const node of root.querySelectorAll("[data-t-placeholder]")) node.placeholder = t(node.dataset.tPlaceholder);
  for (const node of root.querySelectorAll("[data-icon]")) node.prepend(icon(node.dataset.icon));
}

export function tell(text) {
  $("status").textContent = text;
}

// What the browser remembers; nothing where its storage is off.
export const memory = {
  get(name, where = localStorageOr()) { try { return JSON.parse(where.getItem("langmill." + name)); } catch { return null; } },
  set(name, value, where = localStorageOr()) {
    try {
      if (value === null) where.removeItem("langmill." + name);
      else where.setItem("langmill." + name, JSON.stringify(value));
    } catch { /* it lasts until the page is left */ }
  },
};

function localStorageOr() {
  try { return localStorage; } catch { return null; }
}

// A question over the page: resolves with the field's text ("" without one), or null where it was turned down.
export function ask({ title, text = "", label = null, value = "", type = "text", yes, danger = false }) {
  const dialog = $("ask");
  const field = label === null ? null : h("input", { type, value, id: "ask-field", autocomplete: "off", required: true });
  const form = h("form", { method: "dialog" },
    h("h2", { id: "ask-title" }, title),
    text ? h("p", {}, text) : null,
    field && h("label", { for: "ask-field" }, label), field,
    h("div", { class: "row end" },
      h("button", { type: "button", class: "plain", onclick: () => dialog.close() }, t("cancel")),
      h("button", { type: "submit", class: danger ? "solid danger" : "solid" }, yes)));
  dialog.replaceChildren(form);
  dialog.returnValue = "";
  return new Promise((resolve) => {
    form.addEventListener("submit", () => { dialog.returnValue = "yes"; });
    dialog.addEventListener("close", () => {
      resolve(dialog.returnValue === "yes" ? (field ? field.value.trim() : "") : null);
    }, { once: true });
    dialog.showModal();
    (field ?? form.querySelector("[type=submit]")).focus();
    if (field) field.select();
  });
}

export async function copy(text, button) {
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // not a secure context: the old way
    const area = h("textarea", { class: "unseen" });
    area.value = text;
    document.body.append(area);
    area.select();
    done = document.execCommand("copy");
    area.remove();
    button.focus();
  }
  tell(t(done ? "copied" : "copy_failed"));
  const before = [...button.childNodes];
  if (!done || button.dataset.done) return;
  button.dataset.done = "yes";
  button.replaceChildren(icon("check"));
  setTimeout(() => { button.replaceChildren(...before); delete button.dataset.done; }, 1500);
}
