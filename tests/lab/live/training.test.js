import assert from "node:assert/strict";
import { test } from "node:test";
import { clipByNorm } from "../../../src/gradprune/lab/live/gradients.js";
import { createNetwork, flatten } from "../../../src/gradprune/lab/live/network.js";
import {
  createTraining,
  epochSteps,
  nextGradients,
  trainSteps,
} from "../../../src/gradprune/lab/live/training.js";
import { assertClose, floats, forEachCase, reference } from "./reference.js";

function trainingOf(given, options = {}) {
  const { sizes, activation, parameters, inputs, labels, optimizer, masks, maxNorm } = given;
  return createTraining({
    net: createNetwork(sizes, activation, floats(parameters)),
    inputs: floats(inputs),
    labels,
    classes: sizes.at(-1),
    batch: labels.length,
    seed: 1,
    optimizer,
    masks: masks?.map((mask) => Uint8Array.from(mask)),
    change: maxNorm === null ? null : ({ all }) => clipByNorm(all, maxNorm),
    ...options,
  });
}

test("training on all rows at once follows torch, with masks held and gradients clipped", () => {
  forEachCase(reference.training, 4, (given) => {
    const training = trainingOf(given);
    const losses = given.losses.map(() => trainSteps(training, 1));
    assertClose(losses, given.losses, "losses");
    assertClose(flatten(training.net), given.after, "parameters");
  });
});

test("the loss of several steps is the mean over the rows they saw", () => {
  const [given] = reference.training;
  const [one, together] = [trainingOf(given, { batch: 4 }), trainingOf(given, { batch: 4 })];
  const steps = epochSteps(one); // the last one has fewer rows
  const rows = given.labels.length;
  assert.ok(rows % 4 !== 0 && rows > 4);
  let sum = 0;
  for (let step = 0; step < steps; step++) {
    const seen = step < steps - 1 ? 4 : rows % 4;
    sum += seen * trainSteps(one, 1);
  }
  assertClose([trainSteps(together, steps)], [sum / rows], "loss", 1e-12);
  assert.deepEqual(flatten(together.net), flatten(one.net));
});

test("each epoch shows every row once, with its own label, in another order", () => {
  const rows = 11;
  const labels = Int32Array.from({ length: rows }, (_, row) => row % 3);
  const inputs = Float32Array.from({ length: 2 * rows }, (_, i) =>
    i % 2 ? labels[i >> 1] : i >> 1,
  );
  const net = createNetwork([2, 3], "relu", new Float32Array(9));
  const options = { net, inputs, labels, classes: 3, batch: 4, optimizer: { rate: 0 } };
  const seen = [];
  const change = () => {
    const size = seen.length % rows === 8 ? 3 : 4;
    for (let at = 0; at < size; at++) {
      seen.push(training.picked.inputs[2 * at]);
      assert.equal(training.picked.labels[at], training.picked.inputs[2 * at + 1]);
    }
  };
  const training = createTraining({ ...options, seed: 5, change });
  assert.equal(epochSteps(training), 3);
  trainSteps(training, 6);
  assert.equal(training.steps, 6);
  const epochs = [seen.slice(0, rows), seen.slice(rows)];
  for (const epoch of epochs) {
    assert.deepEqual(
      [...epoch].sort((a, b) => a - b),
      [...Array(rows).keys()],
    );
  }
  assert.notDeepEqual(epochs[0], epochs[1]);
});

test("a last batch of one row is a step of its own", () => {
  const [given] = reference.training;
  const rows = given.labels.length;
  const training = trainingOf(given, { batch: rows - 1 });
  assert.equal(epochSteps(training), 2);
  const seen = [];
  for (let step = 0; step < 4; step++) {
    trainSteps(training, 1);
    seen.push(training.position);
  }
  assert.deepEqual(seen, [rows - 1, rows, rows - 1, rows]);
});

test("the parts of a batch are those of tensor_split, and make the whole of it", () => {
  const [given] = reference.training;
  const whole = trainingOf(given, { batch: 6 });
  const parts = [0, 1, 2, 3].map((p) => trainingOf(given, { batch: 6, part: [p, 4] }));
  const seen = [];
  for (const training of [whole, ...parts]) {
    nextGradients(training);
    seen.push([...training.picked.inputs].slice(0, 6 * given.sizes[0]));
  }
  const width = given.sizes[0];
  const rows = [2, 2, 1, 1]; // torch.arange(6).tensor_split(4)
  const joined = rows.flatMap((count, p) => seen[p + 1].slice(0, count * width));
  assert.deepEqual(joined, seen[0]);
  assert.throws(() => trainingOf(given, { batch: 6, part: [4, 4] }), /part must be .*, got 4 of 4/);
  assert.throws(() => trainingOf(given, { batch: 8, part: [0, 4] }), /at most 3, got 0 of 4/);
});

test("batches of one row and of more than there are work", () => {
  const [given] = reference.training;
  const rows = given.labels.length;
  const one = trainingOf(given, { batch: 1 });
  assert.equal(epochSteps(one), rows);
  assert.ok(trainSteps(one, rows) > 0);
  const all = trainingOf(given, { batch: rows + 5 });
  assert.equal(epochSteps(all), 1);
  assertClose([trainSteps(all, 1)], [given.losses[0]], "loss");
});

test("a seed repeats a training, another seed does not", () => {
  const [given] = reference.training;
  const ends = [7, 7, 8].map((seed) => {
    const training = trainingOf(given, { batch: 4, seed });
    trainSteps(training, 9);
    return flatten(training.net);
  });
  assert.deepEqual(ends[0], ends[1]);
  assert.notDeepEqual(ends[0], ends[2]);
});

test("bad inputs, classes and batches are refused", () => {
  const [given] = reference.training;
  assert.throws(() => trainingOf(given, { inputs: new Float32Array(3) }), /got 3 inputs/);
  assert.throws(() => trainingOf(given, { inputs: new Float32Array(0), labels: [] }), /0 labels/);
  assert.throws(() => trainingOf(given, { classes: 2 }), /classes must be .*, got 2/);
  assert.throws(() => trainingOf(given, { batch: 0 }), /batch must be .*, got 0/);
  assert.throws(() => trainingOf(given, { optimizer: { rate: -1 } }), /rate -1/);
});
