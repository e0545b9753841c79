// The conversations at the side: searched, listed, moved through by arrows.
import { call } from "./api.js";
import { $, h } from "./dom.js";
import { t } from "./strings.js";

let shown = [];
let asked = 0; // only the newest answer to a search counts

export function buildList(onProblem) {
  let pause;
  $("search").addEventListener("input", () => {
    clearTimeout(pause);
    pause = setTimeout(() => refresh().catch(onProblem), 150);
  });
  $("search").addEventListener("keydown", (event) => {
    if (event.key !== "ArrowDown") return;
    event.preventDefault();
    $("list").querySelector("a")?.focus();
  });
  $("older").addEventListener("click", () => refresh(shown.length).catch(onProblem));
  $("list").addEventListener("keydown", move);
}

export async function refresh(offset = 0) {
  const mine = ++asked;
  const search = $("search").value.trim();
  const found = await call(`/api/conversations?offset=${offset}&search=${encodeURIComponent(search)}`);
  if (mine !== asked) return;
  shown = offset ? [...shown, ...found.data] : found.data;
  $("older").hidden = !found.more;
  $("fleeting").hidden = found.lasting;
  $("none").hidden = shown.length > 0;
  $("none").textContent = t(search ? "none_found" : "none_yet");
  draw();
}

export function draw() {
  const current = location.hash.slice(1);
  const focused = document.activeElement?.closest?.("#list a")?.hash;
  $("list").replaceChildren(...shown.map((one) => h("li", {},
    h("a", { href: `#${one.id}`, "aria-current": one.id === current ? "page" : null, title: one.title || null,
      tabindex: -1 }, one.title || t("untitled")))));
  const links = [...$("list").querySelectorAll("a")];
  (links.find((link) => link.hasAttribute("aria-current")) ?? links[0])?.setAttribute("tabindex", "0");
  if (focused) links.find((link) => link.hash === focused)?.focus();
}

function move(event) {
  const links = [...$("list").querySelectorAll("a")];
  const at = links.indexOf(document.activeElement);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: links.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  if (to < 0) return $("search").focus();
  links[Math.min(to, links.length - 1)].focus();
}
