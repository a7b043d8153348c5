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
 */
export function createTraining(options) {
  const { net, inputs, labels, classes, batch, passes = DENSE, method = SGD } = options;
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
  return {
    ...{ net, inputs, labels, classes, passes, method, batch: most },
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
  const { net, work, picked, classes, passes, method } = training;
  const logits = passes.forward(net, picked.inputs, rows, work);
  const loss = crossEntropy(logits, picked.labels, classes, picked.gradient);
  const gradients = passes.backward(net, picked.inputs, rows, work, picked.gradient);
  if (training.change) training.change(gradients);
  method.step(net, gradients, training.state, training.masks);
  training.steps++;
  return loss;
}

/** Copies the next rows of the epoch's order, and shuffles anew when it has come to its end. */
function pickBatch(training) {
  const { inputs, labels, picked, net } = training;
  if (training.position === training.order.length) {
    training.order = shuffled(labels.length, training.uniform);
    training.position = 0;
  }
  const end = Math.min(training.position + training.batch, labels.length);
  const rows = training.order.subarray(training.position, end);
  const width = net.sizes[0];
  rows.forEach((row, at) => {
    picked.inputs.set(inputs.subarray(row * width, (row + 1) * width), at * width);
    picked.labels[at] = labels[row];
  });
  training.position = end;
  return rows.length;
}
