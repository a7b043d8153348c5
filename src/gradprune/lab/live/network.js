// What does a network of dense layers answer, and how does its loss depend on each weight?
//
// A network is { sizes, activation, weights, biases }: layer l takes sizes[l] numbers to
// sizes[l + 1], its weights are row-major [out, in] as those of torch's nn.Linear, and an
// activation follows every layer but the last. Twin: torch, by tests.

import { activationNamed } from "./activation.js";
import { backwardDense } from "./dense.js";
import { multiplyTransposed } from "./matrix.js";

/** Returns how many weights and biases a network of these sizes has. */
export function parameterCount(sizes) {
  return layersOf(sizes).reduce((sum, { from, to }) => sum + to * from + to, 0);
}

/** Returns the network whose parameters are `numbers`: weight, bias, weight, bias, ... */
export function createNetwork(sizes, activation, numbers) {
  activationNamed(activation);
  const wanted = parameterCount(sizes);
  if (numbers.length !== wanted) {
    throw new RangeError(`sizes ${sizes} take ${wanted} parameters, got ${numbers.length}`);
  }
  const net = { sizes: [...sizes], activation, weights: [], biases: [] };
  let start = 0;
  for (const { from, to } of layersOf(sizes)) {
    net.weights.push(Float32Array.from(numbers.subarray(start, start + to * from)));
    net.biases.push(Float32Array.from(numbers.subarray(start + to * from, start + to * from + to)));
    start += to * from + to;
  }
  return net;
}

/** Returns a network of its own memory with the same parameters. */
export function copyNetwork(net) {
  return createNetwork(net.sizes, net.activation, flatten(net));
}

/** Gives a network the parameters of another one of its form. */
export function assign(net, from) {
  const to = inOrder(net);
  inOrder(from).forEach((array, at) => {
    to[at].set(array);
  });
}

/** Returns all parameters in torch's order, as `createNetwork` reads them. */
export function flatten(net) {
  const numbers = new Float32Array(parameterCount(net.sizes));
  let start = 0;
  for (const array of inOrder(net)) {
    numbers.set(array, start);
    start += array.length;
  }
  return numbers;
}

/**
 * Returns the memory for passes of up to `rows` rows. After `forward`, before[l] and after[l] are
 * layer l's output before and after the activation; after `backward`, deltas[l] is the gradient at
 * before[l]. `gradients` is what `backward` returns: weights, biases, and `all` in torch's order.
 */
export function createWorkspace(net, rows) {
  const layers = layersOf(net.sizes);
  const widest = Math.max(...net.sizes);
  const perRow = () => layers.map(({ to }) => new Float32Array(rows * to));
  const [before, after] = [perRow(), perRow()];
  after[layers.length - 1] = before[layers.length - 1];
  const gradients = {
    weights: net.weights.map((w) => new Float32Array(w.length)),
    biases: net.biases.map((b) => new Float32Array(b.length)),
  };
  gradients.all = inOrder(gradients);
  return {
    rows,
    before,
    after,
    deltas: perRow(),
    gradients,
    turned: [0, 1].map(() => new Float32Array(widest * Math.max(rows, widest))),
  };
}

/** Returns the logits, rows x out: a view of the workspace, good until the next pass. */
export function forward(net, inputs, rows, work) {
  requireFits(net, inputs, rows, work);
  const { value } = activationNamed(net.activation);
  const layers = layersOf(net.sizes);
  let given = inputs;
  layers.forEach(({ from, to }, layer) => {
    const [before, after] = [work.before[layer], work.after[layer]];
    multiplyTransposed(given, net.weights[layer], net.biases[layer], rows, to, from, before);
    if (after !== before) for (let i = 0; i < rows * to; i++) after[i] = value(before[i]);
    given = after;
  });
  return given.subarray(0, rows * net.sizes.at(-1));
}

/**
 * Returns the gradients of a loss whose gradient at the logits is given; `forward` was called last
 * with the same inputs. What a layer passes down is multiplied by the slope of the activation.
 */
export function backward(net, inputs, rows, work, gradient) {
  requireFits(net, inputs, rows, work);
  const { slope } = activationNamed(net.activation);
  const layers = layersOf(net.sizes);
  work.deltas.at(-1).set(gradient.subarray(0, rows * net.sizes.at(-1)));
  for (let layer = layers.length - 1; layer >= 0; layer--) {
    const { from, to } = layers[layer];
    const delta = work.deltas[layer];
    const given = layer === 0 ? inputs : work.after[layer - 1];
    const gradients = [work.gradients.weights[layer], work.gradients.biases[layer]];
    const [below, before] = layer === 0 ? [null] : [work.deltas[layer - 1], work.before[layer - 1]];
    const shape = { rows, from, to };
    backwardDense(delta, given, net.weights[layer], shape, gradients, below, work.turned);
    if (layer === 0) break;
    for (let i = 0; i < rows * from; i++) below[i] *= slope(before[i], given[i]);
  }
  return work.gradients;
}

/** What training.js and reading.js need to know of such networks, unless they are told otherwise. */
export const DENSE = { createWorkspace, forward, backward };

/** Returns the class with the largest logit of each row, the first among equals. */
export function predictions(logits, classes) {
  const found = new Uint8Array(logits.length / classes);
  for (let row = 0; row < found.length; row++) {
    for (let c = 1; c < classes; c++) {
      if (logits[row * classes + c] > logits[row * classes + found[row]]) found[row] = c;
    }
  }
  return found;
}

function layersOf(sizes) {
  return sizes.slice(1).map((to, layer) => ({ from: sizes[layer], to }));
}

function inOrder({ weights, biases }) {
  return weights.flatMap((array, layer) => [array, biases[layer]]);
}

function requireFits(net, inputs, rows, work) {
  if (rows > work.rows) throw new RangeError(`the workspace has ${work.rows} rows, got ${rows}`);
  const wanted = rows * net.sizes[0];
  if (inputs.length < wanted) {
    throw new RangeError(`${rows} rows take ${wanted} inputs, got ${inputs.length}`);
  }
}
