// How does a reader set something? By the browser's own inputs, each with a label and its value in words.
import { element } from "./stage.js";

// Two figures on one page each have this module: what tells their controls apart is drawn by chance.
const FAMILY = Math.random().toString(36).slice(2);
let controlCount = 0;
const nextId = () => `gp-live-${FAMILY}-${++controlCount}`;

// A quantity. `format` writes it in words, which stand beside the slider and are what a screen reader says.
export function slider({ label, min, max, step, value, format = String, change }) {
  const id = nextId();
  const input = element("input", { type: "range", id, min, max, step, value });
  const output = element("output", { for: id });
  const root = element(
    "div",
    { class: "gp-live-slider" },
    element("label", { for: id }, label),
    input,
    output,
  );
  const write = () => {
    const words = format(Number(input.value));
    output.textContent = words;
    input.setAttribute("aria-valuetext", words);
  };
  input.addEventListener("input", () => {
    write();
    change(Number(input.value));
  });
  write();
  const set = (wanted) => {
    input.value = String(wanted);
    write();
  };
  return { root, input, set };
}

// One of a few: radio buttons. `options` are pairs of value and text.
export function choice({ label, options, value, change }) {
  const name = nextId();
  const buttons = options.map(([is, text]) => {
    const input = element("input", { type: "radio", name, value: is });
    input.checked = is === value;
    input.addEventListener("change", () => change(is));
    return [input, element("label", {}, input, ` ${text}`)];
  });
  const labels = buttons.map(([, root]) => root);
  const root = element(
    "fieldset",
    { class: "gp-live-choice" },
    element("legend", {}, label),
    ...labels,
  );
  const set = (wanted) => {
    for (const [input] of buttons) input.checked = input.value === wanted;
  };
  return { root, set };
}

export function button(text, press) {
  const root = element("button", { type: "button" }, text);
  root.addEventListener("click", press);
  return root;
}
