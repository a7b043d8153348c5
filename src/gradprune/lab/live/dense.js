// What does a layer y = x W^T + b pass on, and how does a loss depend on its parameters?

import { columnSums, multiplyTransposed, transpose } from "./matrix.js";

/**
 * Writes a dense layer's gradients, with D that at its output: D^T x of the weights, the column sums
 * of D of the biases, and D W of the inputs unless `below` is null. `gradient` is [weights, biases];
 * `turned` are two arrays with room for D, x and W each.
 */
export function backwardDense(delta, inputs, weights, shape, gradient, below, turned) {
  const { rows, from, to } = shape;
  transpose(delta, rows, to, turned[0]);
  transpose(inputs, rows, from, turned[1]);
  multiplyTransposed(turned[0], turned[1], null, to, from, rows, gradient[0]);
  columnSums(delta, rows, to, gradient[1]);
  if (below === null) return;
  transpose(weights, to, from, turned[1]);
  multiplyTransposed(delta, turned[1], null, rows, from, to, below);
}

/** Returns the two arrays that `backwardDense` turns its matrices in. */
export function turningRoom({ rows, from, to }) {
  const size = Math.max(rows * from, rows * to, from * to);
  return [new Float64Array(size), new Float64Array(size)];
}

/**
 * Returns a layer of `layered.js` that takes `from` numbers to `to` by the same weights at each of
 * `places`. Twin: torch.nn.Linear.
 */
export function denseLayer(from, to, places = 1) {
  const shapeOf = (rows) => ({ rows: rows * places, from, to });
  return {
    from: from * places,
    to: to * places,
    parameters: [
      ["weights", to * from],
      ["biases", to],
    ],
    room: (rows) => ({ turned: turningRoom(shapeOf(rows)) }),
    forward([weights, biases], inputs, rows, { out }) {
      multiplyTransposed(inputs, weights, biases, rows * places, to, from, out);
    },
    backward([weights], inputs, rows, { turned }, delta, gradients, below) {
      backwardDense(delta, inputs, weights, shapeOf(rows), gradients, below, turned);
    },
  };
}
