// How well does a network read examples?
import { DENSE, predictions } from "./network.js";

// Returns a function from a network of these widths to `{ accuracy, byClass }`: the share of all rows that it reads
// correctly, and that of the rows of each class. `passes` are those of its kind of network.
export function createReader(net, { inputs, labels, rows }, passes = DENSE) {
  const work = passes.createWorkspace(net, rows);
  const judge = createJudge(labels, net.sizes.at(-1));
  return (network) => judge(passes.forward(network, inputs, rows, work));
}

// The same from the logits of all rows, wherever they come from.
export function createJudge(labels, classes) {
  const counts = new Array(classes).fill(0);
  for (const label of labels) counts[label] += 1;
  return (logits) => {
    const answers = predictions(logits, classes);
    const right = new Array(classes).fill(0);
    answers.forEach((answer, row) => {
      if (answer === labels[row]) right[answer] += 1;
    });
    const byClass = right.map((count, c) => count / counts[c]);
    return { accuracy: right.reduce((a, b) => a + b) / labels.length, byClass };
  };
}

export const countKept = (masks) =>
  masks.reduce((sum, mask) => sum + mask.reduce((a, b) => a + b, 0), 0);

export const countAll = (arrays) => arrays.reduce((sum, { length }) => sum + length, 0);

// A count, its thousands set apart.
export const whole = (count) => count.toLocaleString("en");

// A share, with the sign on the same line.
export const percent = (share) => `${(100 * share).toFixed(1)}\u00a0%`;

// What Python goes on from (twin: digits.py): the settings of the page, which weights it keeps there, and all numbers of
// the network, where they are not those that Python has.
export const goingOn = (setting, masks, numbers) => ({
  setting,
  kept: new DataView(joinBytes(masks).buffer),
  ...(numbers && { numbers: new DataView(numbers.buffer) }),
});

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
