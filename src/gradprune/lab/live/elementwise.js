// Which layers have no weights between one number and another: an activation, a place, a mean?

import { activationNamed } from "./activation.js";
import { columnSums } from "./matrix.js";

/** Returns an activation of `size` numbers as a layer. Twins: torch.nn.ReLU and its like. */
export function activationLayer(size, name) {
  const { value, slope } = activationNamed(name);
  return {
    ...{ from: size, to: size, parameters: [], room: () => ({}) },
    forward(_, inputs, rows, { out }) {
      for (let i = 0; i < rows * size; i++) out[i] = value(inputs[i]);
    },
    backward(_, inputs, rows, { out }, delta, __, below) {
      if (below === null) return;
      for (let i = 0; i < rows * size; i++) below[i] = delta[i] * slope(inputs[i], out[i]);
    },
  };
}

/** Returns a layer that adds a vector of its own to each place. Twin: x + torch.nn.Embedding.weight. */
export function placeLayer(size) {
  return {
    ...{ from: size, to: size, parameters: [["biases", size]], room: () => ({}) },
    forward([table], inputs, rows, { out }) {
      for (let i = 0; i < rows * size; i++) out[i] = inputs[i] + table[i % size];
    },
    backward(_, __, rows, ___, delta, [gradient], below) {
      columnSums(delta, rows, size, gradient);
      if (below !== null) below.set(delta.subarray(0, rows * size));
    },
  };
}

/** Returns a layer that gives the mean of `places` vectors of `width` numbers. */
export function meanLayer(width, places) {
  const size = width * places;
  return {
    ...{ from: size, to: width, parameters: [], room: () => ({}) },
    forward(_, inputs, rows, { out }) {
      out.fill(0, 0, rows * width);
      for (let row = 0; row < rows; row++) {
        for (let i = 0; i < size; i++)
          out[row * width + (i % width)] += inputs[row * size + i] / places;
      }
    },
    backward(_, __, rows, ___, delta, ____, below) {
      if (below === null) return;
      for (let row = 0; row < rows; row++) {
        for (let i = 0; i < size; i++)
          below[row * size + i] = delta[row * width + (i % width)] / places;
      }
    },
  };
}
