// How is a network trained, a few steps at a time, so that a figure can draw in between?

import { crossEntropy } from "./losses.js";
import { DENSE } from "./network.js";
import { SGD } from "./optimizer.js";
import { generator, shuffled } from "./random.js";

/**
 * Returns a training of `net` by cross entropy, before its first step. `passes` are those of its kind
 * of network, `method` is SGD or ADAM and `optimizer` what its `create` takes; `masks`, one for each
 * array of weights, are held; `change(gradients)` is called between backward and step, with what
 * `backward` returns. `state` (the method's), `masks` and `change` may be set anew between steps.
 * With `part` [p, count] it sees the p-th of `count` parts of each batch, as torch.tensor_split cuts it.
 */
export function createTraining(options) {
  const { net, inputs, labels, classes, batch, part = [0, 1] } = options;
  const { passes = DENSE, method = SGD } = options;
  const rows = labels.length;
  if (rows === 0 || inputs.length !== rows * net.sizes[0]) {
    const given = `${inputs.length} inputs and ${rows} labels`;
    throw new RangeError(`each label has ${net.sizes[0]} inputs, got ${given}`);
  }
  if (classes !== net.sizes.at(-1)) {
    throw new RangeError(`classes must be the network's ${net.sizes.at(-1)}, got ${classes}`);
  }
  if (!(Number.isInteger(batch) && batch > 0)) {
    throw new RangeError(`batch must be a whole number of at least 1, got ${batch}`);
  }
  const most = Math.min(batch, rows);
  const least = rows % most || most;
  if (!(part[0] >= 0 && part[0] < part[1] && part[1] <= least)) {
    throw new RangeError(`part must be one of at most ${least}, got ${part[0]} of ${part[1]}`);
  }
  return {
    ...{ net, inputs, labels, classes, passes, method, batch: most, part },
    masks: options.masks ?? null,
    change: options.change ?? null,
    state: method.create(net, options.optimizer),
    work: passes.createWorkspace(net, most),
    picked: {
      inputs: new Float32Array(most * net.sizes[0]),
      labels: new Int32Array(most),
      gradient: new Float64Array(most * classes),
    },
    uniform: generator(options.seed),
    order: new Int32Array(0),
    position: 0,
    steps: 0,
  };
}

/** Returns how many steps see every row once; the last may be of fewer rows. */
export function epochSteps(training) {
  return Math.ceil(training.labels.length / training.batch);
}

/** Takes `count` steps and returns the mean loss over the rows they saw, each before its step. */
export function trainSteps(training, count) {
  let [sum, seen] = [0, 0];
  for (let step = 0; step < count; step++) {
    const rows = pickBatch(training);
    sum += rows * trainStep(training, rows);
    seen += rows;
  }
  return sum / seen;
}

function trainStep(training, rows) {
  const { loss, gradients } = gradientsOf(training, rows, training.net);
  if (training.change) training.change(gradients);
  takeStep(training, gradients);
  return loss;
}

/** Takes the next batch and returns the gradients there of `net`, which may be another than the one that is trained. */
export function nextGradients(training, net = training.net) {
  return gradientsOf(training, pickBatch(training), net).gradients;
}

/** Steps the network by gradients, wherever they come from. */
export function takeStep(training, gradients) {
  training.method.step(training.net, gradients, training.state, training.masks);
  training.steps++;
}

function gradientsOf({ work, picked, classes, passes }, rows, net) {
  const logits = passes.forward(net, picked.inputs, rows, work);
  const loss = crossEntropy(logits, picked.labels, classes, picked.gradient);
  return { loss, gradients: passes.backward(net, picked.inputs, rows, work, picked.gradient) };
}

/** Copies its part of the next rows of the epoch's order, and shuffles anew when that has come to its end. */
function pickBatch(training) {
  const { inputs, labels, picked, net } = training;
  if (training.position === training.order.length) {
    training.order = shuffled(labels.length, training.uniform);
    training.position = 0;
  }
  const end = Math.min(training.position + training.batch, labels.length);
  const rows = partOf(training.order.subarray(training.position, end), training.part);
  const width = net.sizes[0];
  rows.forEach((row, at) => {
    picked.inputs.set(inputs.subarray(row * width, (row + 1) * width), at * width);
    picked.labels[at] = labels[row];
  });
  training.position = end;
  return rows.length;
}

/** The parts are as long as each other, or one longer: the first ones. */
function partOf(rows, [at, count]) {
  const start = (part) =>
    part * Math.floor(rows.length / count) + Math.min(part, rows.length % count);
  return rows.subarray(start(at), start(at + 1));
}
