// What does a small window see that is moved over a picture?

import { backwardDense, turningRoom } from "./dense.js";
import { multiplyTransposed, transpose } from "./matrix.js";

/**
 * Returns a convolution as a layer: `channels` square pictures of `side` to `filters` smaller ones, by
 * windows of `kernel` pixels a side, `stride` apart, with `padding` zeros around. Each window becomes
 * a row, so that one product of matrices has them all. Twin: torch.nn.Conv2d.
 */
export function convolutionLayer(channels, filters, side, { kernel, stride, padding }) {
  const taps = tapsOf(channels, side, { kernel, stride, padding });
  const window = channels * kernel * kernel;
  const places = taps.length / window;
  const [from, to] = [channels * side * side, filters * places];
  const shapeOf = (rows) => ({ rows: rows * places, from: window, to: filters });
  // Between pictures one after the other, as torch has them, and pixels one after the other.
  const toPixels = (pictures, rows, pixels) => transpose(pictures, filters, places, pixels, rows);
  const toPictures = (pixels, rows, pictures) => transpose(pixels, places, filters, pictures, rows);
  return {
    ...{ from, to },
    parameters: [
      ["weights", filters * window],
      ["biases", filters],
    ],
    room: (rows) => ({
      windows: new Float64Array(rows * taps.length),
      pixels: new Float64Array(rows * to),
      turned: turningRoom(shapeOf(rows)),
    }),
    forward([weights, biases], inputs, rows, { windows, pixels, out }) {
      for (let row = 0; row < rows; row++) {
        for (let i = 0; i < taps.length; i++)
          windows[row * taps.length + i] = taps[i] < 0 ? 0 : inputs[row * from + taps[i]];
      }
      multiplyTransposed(windows, weights, biases, rows * places, filters, window, pixels);
      toPictures(pixels, rows, out);
    },
    backward([weights], _, rows, { windows, pixels, turned }, delta, gradients, below) {
      toPixels(delta, rows, pixels);
      const seen = below === null ? null : windows; // what each window saw becomes its gradient
      backwardDense(pixels, windows, weights, shapeOf(rows), gradients, seen, turned);
      if (below === null) return;
      below.fill(0, 0, rows * from);
      for (let row = 0; row < rows; row++) {
        for (let i = 0; i < taps.length; i++)
          if (taps[i] >= 0) below[row * from + taps[i]] += windows[row * taps.length + i];
      }
    },
  };
}

/** For each window, from the upper left, each of its pixels: which number of the picture, or -1. */
function tapsOf(channels, side, { kernel, stride, padding }) {
  const across = Math.floor((side + 2 * padding - kernel) / stride) + 1;
  if (across < 1) throw new RangeError(`windows of ${kernel} leave nothing of a side of ${side}`);
  const taps = [];
  for (let place = 0; place < across * across; place++) {
    const top = Math.floor(place / across) * stride - padding;
    const left = (place % across) * stride - padding;
    for (let i = 0; i < channels * kernel * kernel; i++) {
      const channel = Math.floor(i / (kernel * kernel));
      const y = top + (Math.floor(i / kernel) % kernel);
      const x = left + (i % kernel);
      const inside = y >= 0 && y < side && x >= 0 && x < side;
      taps.push(inside ? (channel * side + y) * side + x : -1);
    }
  }
  return Int32Array.from(taps);
}
