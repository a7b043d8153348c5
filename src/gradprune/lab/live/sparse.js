// What can be left out of a network whose weights are zero in part: by rows without their zeros, or as fewer units.

import { activationNamed } from "./activation.js";
import { createNetwork } from "./network.js";
import { keepLargest, keptCount } from "./rank.js";

/**
 * Returns a rows x columns matrix without its zeros (CSR): row i has values[starts[i] .. starts[i + 1]] at the columns
 * places[...]. Twin: torch.Tensor.to_sparse_csr.
 */
export function compressRows(matrix, rows, columns) {
  const count = matrix.reduce((sum, value) => sum + (value === 0 ? 0 : 1), 0);
  const [starts, places] = [new Uint32Array(rows + 1), new Uint32Array(count)];
  const values = new Float32Array(count);
  let at = 0;
  for (let i = 0; i < rows; i++) {
    for (let j = 0; j < columns; j++) {
      const value = matrix[i * columns + j];
      if (value === 0) continue;
      places[at] = j;
      values[at] = value;
      at += 1;
    }
    starts[i + 1] = at;
  }
  return { starts, places, values };
}

/**
 * Writes a b^T + bias into out, as multiplyTransposed does, for a matrix b by rows. Two rows of a meet each value, so
 * that a place is read once for two products; an odd last row is computed twice over.
 */
export function multiplyRows(a, { starts, places, values }, bias, rows, columns, inner, out) {
  for (let i = 0; i < rows; i += 2) {
    const next = Math.min(i + 1, rows - 1);
    const a0 = i * inner;
    const a1 = next * inner;
    for (let j = 0; j < columns; j++) {
      let s0 = bias[j];
      let s1 = s0;
      const end = starts[j + 1];
      for (let k = starts[j]; k < end; k++) {
        const place = places[k];
        const value = values[k];
        s0 += a[a0 + place] * value;
        s1 += a[a1 + place] * value;
      }
      out[i * columns + j] = s0;
      out[next * columns + j] = s1;
    }
  }
}

/** Returns a network by rows: { sizes, activation, layers, biases }. */
export function compressNetwork({ sizes, activation, weights, biases }) {
  const layers = weights.map((array, layer) => compressRows(array, sizes[layer + 1], sizes[layer]));
  return { sizes, activation, layers, biases };
}

/** Returns the logits of a network by rows; the workspace is that of the network with its zeros. */
export function forwardRows({ sizes, activation, layers, biases }, inputs, rows, work) {
  const { value } = activationNamed(activation);
  let given = inputs;
  layers.forEach((matrix, layer) => {
    const [before, after] = [work.before[layer], work.after[layer]];
    const [from, to] = [sizes[layer], sizes[layer + 1]];
    multiplyRows(given, matrix, biases[layer], rows, to, from, before);
    if (after !== before) for (let i = 0; i < rows * to; i++) after[i] = value(before[i]);
    given = after;
  });
  return given.subarray(0, rows * sizes.at(-1));
}

/**
 * Returns the network without the hidden units that nothing leads into, or that lead nowhere: the same function. What
 * a unit without inputs puts out, the activation of its bias, goes into the next biases. A layer keeps one unit.
 * Twin: gp.shrink.
 */
export function withoutIdleUnits(net) {
  let found = net;
  for (;;) {
    const smaller = withoutIdleOnce(found);
    if (smaller.sizes.join() === found.sizes.join()) return found;
    found = smaller;
  }
}

function withoutIdleOnce({ sizes, activation, weights, biases }) {
  const { value } = activationNamed(activation);
  const stay = sizes.map((size, layer) => {
    const all = Array.from({ length: size }, (_, unit) => unit);
    if (layer === 0 || layer === sizes.length - 1) return all;
    const busy = all.filter((unit) => {
      const into = rowOf(weights[layer - 1], unit, sizes[layer - 1]);
      const outOf = weights[layer].filter((_, at) => at % size === unit);
      return [into, outOf].every((some) => some.some((w) => w !== 0));
    });
    return busy.length > 0 ? busy : all.slice(0, 1);
  });
  const numbers = weights.flatMap((array, layer) => {
    const from = sizes[layer];
    const bias = biases[layer].slice();
    const gone = Array.from({ length: from }, (_, unit) => unit).filter(
      (unit) => !stay[layer].includes(unit),
    );
    for (const unit of gone) {
      const into = rowOf(weights[layer - 1], unit, sizes[layer - 1]);
      if (into.some((w) => w !== 0)) continue; // it leads nowhere
      const constant = value(biases[layer - 1][unit]);
      bias.forEach((_, to) => {
        bias[to] += array[to * from + unit] * constant;
      });
    }
    const kept = stay[layer + 1].flatMap((to) =>
      stay[layer].map((unit) => array[to * from + unit]),
    );
    return [...kept, ...stay[layer + 1].map((to) => bias[to])];
  });
  const narrow = stay.map(({ length }) => length);
  return createNetwork(narrow, activation, Float32Array.from(numbers));
}

const rowOf = (matrix, i, columns) => matrix.subarray(i * columns, (i + 1) * columns);

/**
 * Returns masks under which whole units of the first layer lose their weights, those of the least mean score; at least
 * one stays. Twin: gp.prune(granularity="channel", include="0.*").
 */
export function unitMasks(scores, sizes, sparsity) {
  const [from, to] = sizes;
  const means = Float32Array.from({ length: to }, (_, unit) => {
    const row = scores[0].subarray(unit * from, (unit + 1) * from);
    return row.reduce((sum, score) => sum + score, 0) / from;
  });
  const units = Math.ceil(keptCount(from * to, sparsity) / from - 0.5); // the nearest, of two the fewer
  const [stays] = keepLargest([means], Math.max(1, units));
  return scores.map((array, layer) =>
    Uint8Array.from(array, (_, at) => (layer > 0 ? 1 : stays[Math.floor(at / from)])),
  );
}
