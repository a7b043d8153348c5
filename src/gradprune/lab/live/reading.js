// How well does a network read examples?
import { DENSE, predictions } from "./network.js";

// Returns a function from a network of these widths to `{ accuracy, right }`: `right[c]` counts those of class c.
// `passes` are those of its kind of network.
export function createReader(net, { inputs, labels, rows }, passes = DENSE) {
  const work = passes.createWorkspace(net, rows);
  const classes = net.sizes.at(-1);
  return (network) => {
    const answers = predictions(passes.forward(network, inputs, rows, work), classes);
    const right = new Array(classes).fill(0);
    answers.forEach((answer, row) => {
      if (answer === labels[row]) right[answer] += 1;
    });
    return { accuracy: right.reduce((a, b) => a + b) / rows, right };
  };
}

export const countKept = (masks) =>
  masks.reduce((sum, mask) => sum + mask.reduce((a, b) => a + b, 0), 0);

export const countAll = (arrays) => arrays.reduce((sum, { length }) => sum + length, 0);

// A count, its thousands set apart.
export const whole = (count) => count.toLocaleString("en");

export const percent = (share) => `${(100 * share).toFixed(1)} %`;

// One mask after the other, as bytes.
export function joinBytes(arrays) {
  const joined = new Uint8Array(countAll(arrays));
  let at = 0;
  for (const array of arrays) {
    joined.set(array, at);
    at += array.length;
  }
  return joined;
}
