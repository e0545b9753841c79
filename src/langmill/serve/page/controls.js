// How to answer: the system prompt and how tokens are chosen. An empty field leaves it to the server.
import { $, h, memory } from "./dom.js";
import { t } from "./strings.js";

const NUMBERS = {
  temperature: { min: 0, max: 2, step: 0.1 },
  top_p: { min: 0.01, max: 1, step: 0.01 },
  top_k: { min: 0, step: 1 },
  min_p: { min: 0, max: 1, step: 0.01 },
  repetition_penalty: { min: 0.1, max: 5, step: 0.05 },
  max_tokens: { min: 1, step: 1 },
  seed: { min: 0, max: Number.MAX_SAFE_INTEGER, step: 1 },
};
const USUAL = { temperature: 0.7, likely: true };

export function buildControls() {
  const rows = Object.entries(NUMBERS).map(([name, range]) => h("div", { class: "setting" },
    h("label", { for: `how-${name}` }, t(name)),
    h("input", { type: "number", id: `how-${name}`, name, ...range, step: range.step === 1 ? 1 : "any", inputmode: "decimal",
      placeholder: t("unset"), "aria-describedby": `how-${name}-help how-${name}-wrong` }),
    h("p", { class: "quiet", id: `how-${name}-help` }, t(`${name}_help`)),
    h("p", { class: "wrong", id: `how-${name}-wrong`, role: "alert", hidden: true })));
  $("how").replaceChildren(
    h("label", { for: "how-system" }, t("system")),
    h("textarea", { id: "how-system", name: "system", rows: 5, placeholder: t("system_here") }),
    ...rows,
    h("label", { class: "check" }, h("input", { type: "checkbox", name: "likely" }), t("likely")),
    h("button", { type: "button", class: "plain", onclick: () => { fill(USUAL); changed(); } }, t("reset")));
  $("how").addEventListener("submit", (event) => event.preventDefault());
  $("how").addEventListener("input", changed);
  fill(memory.get("how") ?? USUAL);
}

// Show these values; what they do not name is left to the server.
export function fill(values) {
  const form = $("how").elements;
  form.system.value = values.system ?? "";
  for (const name of Object.keys(NUMBERS)) form[name].value = values[name] ?? "";
  form.likely.checked = values.likely ?? true;
  for (const name of Object.keys(NUMBERS)) check(name);
}

// The values that are set; null, with the first wrong one in focus, where there is one.
export function values() {
  const form = $("how").elements;
  const found = { likely: form.likely.checked };
  if (form.system.value.trim()) found.system = form.system.value;
  for (const name of Object.keys(NUMBERS)) {
    if (!check(name)) return { wrong: form[name] };
    if (form[name].value !== "") found[name] = Number(form[name].value);
  }
  return found;
}

function changed() {
  const found = values();
  if (!found.wrong) memory.set("how", found);
}

function check(name) {
  const field = $("how").elements[name];
  const { min, max } = NUMBERS[name];
  const wrong = $(`how-${name}-wrong`);
  const fine = field.validity.valid;
  field.setAttribute("aria-invalid", String(!fine));
  wrong.hidden = fine;
  wrong.textContent = fine ? "" : t(max === undefined ? "invalid_from" : "invalid", { name: t(name), min, max });
  return fine;
}
