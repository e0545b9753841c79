// The second view of an answer: each token with its probability, and what else was likely in its place.
import { call } from "./api.js";
import { h } from "./dom.js";
import { number, t } from "./strings.js";

const STEPS = [0.9, 0.6, 0.3, 0.1]; // the colours change below these

// Fill `body` with the tokens of an answer.
export async function showTokens(body, conversation, message) {
  const found = await call(`/api/conversations/${conversation}/messages/${message}/tokens`);
  const others = h("div", { class: "others", "aria-live": "polite" });
  const row = h("div", { class: "tokens", role: "group", "aria-label": t("tokens") });
  found.tokens.forEach((token, place) => {
    row.append(h("button", {
      type: "button", class: `token p${STEPS.filter((step) => token.probability < step).length}`,
      tabindex: place ? -1 : 0, "aria-pressed": "false",
      "aria-label": t("token_label", { text: spoken(token.text), percent: percent(token.probability) }),
      onclick: (event) => choose(row, event.currentTarget, others, token),
    }, h("span", { class: "text" }, visible(token.text)), h("span", { class: "share" }, percent(token.probability))));
    if (token.text.includes("\n")) row.append(h("span", { class: "turn-line" }));
  });
  row.addEventListener("keydown", move);
  body.replaceChildren(
    h("p", { class: "quiet" }, t("tokens_help"), " ",
      found.perplexity === null ? "" : t("perplexity", { number: number(found.perplexity, 2) })),
    row, others);
}

function choose(row, button, others, token) {
  for (const one of row.querySelectorAll("[aria-pressed=true]")) one.setAttribute("aria-pressed", "false");
  button.setAttribute("aria-pressed", "true");
  rove(row, button);
  const rows = token.others.map((other) => h("tr", { class: other.text === token.text ? "chosen" : null },
    h("td", {}, h("code", {}, visible(other.text))),
    h("td", { class: "number" }, `${percent(other.probability)} %`),
    h("td", { "aria-hidden": "true" }, h("meter", { min: 0, max: 1, value: other.probability }))));
  others.replaceChildren(h("table", {},
    h("thead", {},
      h("tr", {}, h("th", { class: "lead", colspan: 3, scope: "colgroup" },
        t("token_others", { text: visible(token.text), percent: percent(token.probability) }))),
      h("tr", { class: "unseen" }, h("th", { scope: "col" }, t("token_other")), h("th", { scope: "col" }, t("probability")))),
    h("tbody", {}, ...rows)));
}

function move(event) {
  const buttons = [...event.currentTarget.querySelectorAll("button")];
  const at = buttons.indexOf(document.activeElement);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
  if (to === undefined || !buttons[to]) return;
  event.preventDefault();
  rove(event.currentTarget, buttons[to]);
  buttons[to].focus();
}

function rove(row, button) {
  row.querySelector("[tabindex='0']")?.setAttribute("tabindex", "-1");
  button.setAttribute("tabindex", "0");
}

function percent(share) {
  return share > 0 && share < 0.001 ? "<0.1" : number(share * 100, share < 0.1 ? 1 : 0);
}

// Spaces and line ends as signs, so that they can be seen and chosen.
function visible(text) {
  return text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ | $/g, "·").replace(/\p{Cc}/gu, "�") || "∅";
}

function spoken(text) {
  if (/^ +$/.test(text)) return t("space");
  return /^\n+$/.test(text) ? t("line_end") : text.trim() || visible(text);
}
