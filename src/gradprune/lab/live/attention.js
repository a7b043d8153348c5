// What does each place of a sequence take from the others?

import { backwardDense, turningRoom } from "./dense.js";
import { multiplyTransposed } from "./matrix.js";
import { backwardNorm, forwardNorm } from "./normalise.js";

/**
 * Returns a block of self-attention as a layer: x + attention(norm(x)), for `places` vectors of
 * `width` numbers. Of each normalised vector one matrix makes query, key and value; in each of
 * `heads` slices a place takes the mean of all values, weighed by softmax(query . key / sqrt(d)).
 * Twins: torch.nn.MultiheadAttention and torch.nn.LayerNorm, whose parameters come in this order.
 */
export function attentionLayer(width, heads, places) {
  if (width % heads !== 0) throw new RangeError(`${heads} heads cannot share ${width} numbers`);
  const size = width * places;
  const spot = { width, heads, places };
  const packed = (rows) => ({ rows: rows * places, from: width, to: 3 * width });
  const square = (rows) => ({ rows: rows * places, from: width, to: width });
  return {
    from: size,
    to: size,
    parameters: [
      ["weights", 3 * width * width],
      ["biases", 3 * width],
      ["weights", width * width],
      ...[width, width, width].map((count) => ["biases", count]),
    ],
    room: (rows) => ({
      normed: new Float64Array(rows * size),
      norm: { plain: new Float64Array(rows * size), scales: new Float64Array(rows * places) },
      asked: new Float64Array(rows * size * 3), // query, key and value of each place
      shares: new Float64Array(rows * heads * places * places),
      mixed: new Float64Array(rows * size),
      deltaMixed: new Float64Array(rows * size),
      deltaAsked: new Float64Array(rows * size * 3),
      turned: turningRoom(packed(rows)),
    }),
    forward([ask, askBias, give, giveBias, ...affine], inputs, rows, room) {
      const { normed, norm, asked, shares, mixed, out } = room;
      forwardNorm(inputs, affine, rows * places, width, norm, normed);
      multiplyTransposed(normed, ask, askBias, rows * places, 3 * width, width, asked);
      eachHead(rows, spot, (at) => mix(asked, shares, mixed, spot, at));
      multiplyTransposed(mixed, give, giveBias, rows * places, width, width, out);
      for (let i = 0; i < rows * size; i++) out[i] += inputs[i];
    },
    backward([ask, , give, , ...affine], _, rows, room, delta, gradients, below) {
      const { normed, norm, asked, shares, mixed, deltaMixed, deltaAsked, turned } = room;
      const [ofAsk, ofAskBias, ofGive, ofGiveBias, ...ofAffine] = gradients;
      backwardDense(
        ...[delta, mixed, give, square(rows), [ofGive, ofGiveBias], deltaMixed, turned],
      );
      deltaAsked.fill(0);
      eachHead(rows, spot, (at) => unmix(asked, shares, deltaMixed, deltaAsked, spot, at));
      backwardDense(
        ...[deltaAsked, normed, ask, packed(rows), [ofAsk, ofAskBias], deltaMixed, turned],
      );
      const into = below ?? new Float64Array(rows * size);
      into.set(delta.subarray(0, rows * size));
      backwardNorm(deltaMixed, affine, rows * places, width, norm, ofAffine, into);
    },
  };
}

/** Calls `visit` for each head of each row: where its queries, its shares and its mixture begin. */
function eachHead(rows, { width, heads, places }, visit) {
  for (let row = 0; row < rows; row++) {
    for (let head = 0; head < heads; head++) {
      visit({
        query: row * places * 3 * width + (head * width) / heads,
        share: (row * heads + head) * places * places,
        mixed: row * places * width + (head * width) / heads,
      });
    }
  }
}

/** Writes one head's shares, softmax(query . key / sqrt(d)), and the values mixed by them. */
function mix(asked, shares, mixed, { width, heads, places }, at) {
  const d = width / heads;
  const scale = 1 / Math.sqrt(d);
  const apart = 3 * width;
  for (let i = 0; i < places; i++) {
    const own = at.share + i * places;
    const query = at.query + i * apart;
    const into = at.mixed + i * width;
    let largest = -Infinity;
    for (let j = 0; j < places; j++) {
      const key = at.query + width + j * apart;
      let score = 0;
      for (let c = 0; c < d; c++) score += asked[query + c] * asked[key + c];
      shares[own + j] = score * scale;
      largest = Math.max(largest, shares[own + j]);
    }
    let sum = 0;
    for (let j = 0; j < places; j++) {
      const share = Math.exp(shares[own + j] - largest);
      shares[own + j] = share;
      sum += share;
    }
    for (let c = 0; c < d; c++) mixed[into + c] = 0;
    for (let j = 0; j < places; j++) {
      const value = at.query + 2 * width + j * apart;
      const share = shares[own + j] / sum;
      shares[own + j] = share;
      for (let c = 0; c < d; c++) mixed[into + c] += share * asked[value + c];
    }
  }
}

/** Adds one head's gradients of queries, keys and values, from that of its mixture. */
function unmix(asked, shares, deltaMixed, deltaAsked, { width, heads, places }, at) {
  const d = width / heads;
  const [key, value] = [at.query + width, at.query + 2 * width];
  const ofShare = new Float64Array(places);
  for (let i = 0; i < places; i++) {
    const own = at.share + i * places;
    const [query, mixed] = [at.query + i * 3 * width, at.mixed + i * width];
    let mean = 0;
    for (let j = 0; j < places; j++) {
      const from = value + j * 3 * width;
      let total = 0;
      for (let c = 0; c < d; c++) {
        total += deltaMixed[mixed + c] * asked[from + c];
        deltaAsked[from + c] += shares[own + j] * deltaMixed[mixed + c];
      }
      ofShare[j] = total;
      mean += shares[own + j] * total;
    }
    for (let j = 0; j < places; j++) {
      const ofScore = (shares[own + j] * (ofShare[j] - mean)) / Math.sqrt(d);
      const other = key + j * 3 * width;
      for (let c = 0; c < d; c++) {
        deltaAsked[query + c] += ofScore * asked[other + c];
        deltaAsked[other + c] += ofScore * asked[query + c];
      }
    }
  }
}
