// What does one say of the gradient of a deep network, and of its training?
import { plain, scientific } from "./chart.js";
import { percent } from "./reading.js";

export const layersIn = (count) => (count === 1 ? "1 layer" : `${count} layers`);

const power = (value) => {
  if (value === 0) return "0";
  if (!Number.isFinite(value)) return "beyond single precision";
  if (value < 0.01 || value >= 1000) return scientific(value);
  return value < 100 ? value.toPrecision(2) : value.toFixed(0);
};

// A small share, as one says it.
const PARTS = [
  [1e18, "more than a million million million"],
  [1e12, "million million"],
  [1e6, "million"],
  [1e3, "thousand"],
];
const onePartIn = (share) => {
  if (!(share > 0 && share < 1e-3)) return "";
  const [size, name] = PARTS.find(([least]) => 1 / share >= least);
  return ` (one part in ${size === 1e18 ? name : `${plain(Number((1 / share / size).toPrecision(2)))} ${name}`})`;
};

function said(ratio) {
  if (ratio === 0) return "0: what is left is below single precision's smallest number";
  if (!Number.isFinite(ratio)) return "beyond single precision's largest number";
  return `${power(ratio)} ${ratio < 1 ? "of" : "times"} what it is at the output${onePartIn(ratio)}`;
}

// `ratio` is the first layer's gradient over the last one's, `predicted` the same by formula; `accuracy` is null where it
// was not read.
export function depthSentence({ ratio, predicted, steps, moved, accuracy, broken }) {
  const arrives = `At the first layer the gradient is ${said(ratio)}`;
  const start = `${arrives}; the formula${steps > 0 ? ", before training," : ""} says ${power(predicted)}.`;
  if (broken)
    return `${start} After ${steps} steps the loss is no number any more: the network exploded.`;
  if (steps === 0) return start;
  const read =
    accuracy === null ? "" : `, and the network reads ${percent(accuracy)} of the test digits`;
  return `${start} After ${steps} steps layer 1 has moved by ${percent(moved)} of its norm${read}.`;
}
