// Which weights are the largest, exactly, over many arrays taken as one?

import { shareOut } from "./share.js";

/** Returns the nearest whole number, of two equally near the even one. Twin: Python's round. */
export function roundHalfEven(x) {
  const below = Math.floor(x);
  if (x - below !== 0.5) return Math.round(x);
  return below % 2 === 0 ? below : below + 1;
}

/** Returns how many of `total` weights stay at a sparsity in [0, 1], as gp.prune counts them. */
export function keptCount(total, sparsity) {
  if (!(sparsity >= 0 && sparsity <= 1)) {
    throw new RangeError(`sparsity must be between 0 and 1, got ${sparsity}`);
  }
  return total - roundHalfEven(sparsity * total);
}

/** Returns |w| of every weight. Twin: gp.magnitude. */
export function magnitudeScores(weights) {
  return weights.map((array) => array.map(Math.abs));
}

/** Returns -|w|: with these scores the largest weights go first. */
export function largestScores(weights) {
  return weights.map((array) => array.map((w) => -Math.abs(w)));
}

/**
 * Returns masks that are 1 for exactly the k largest of all scores; of equal ones the later stays.
 * Twin: gp.keep_largest.
 */
export function keepLargest(scores, k) {
  const joined = joinedScores(scores);
  const masks = scores.map((array) => new Uint8Array(array.length));
  if (!(Number.isInteger(k) && k >= 0 && k <= joined.length)) {
    throw new RangeError(`k must be a whole number from 0 to ${joined.length}, got ${k}`);
  }
  if (k === 0) return masks;
  const least = kthSmallest(joined, joined.length - k + 1);
  let ties = k - joined.reduce((count, score) => count + (score > least ? 1 : 0), 0);
  for (let a = scores.length - 1; a >= 0; a--) {
    for (let i = scores[a].length - 1; i >= 0; i--) {
      const stays = scores[a][i] > least || (scores[a][i] === least && ties > 0);
      if (stays) masks[a][i] = 1;
      if (scores[a][i] === least) ties--;
    }
  }
  return masks;
}

/**
 * Returns the masks of a sparsity: `scope` "global" ranks all weights together, "layer" takes the
 * same share of each array. No array becomes empty as long as one weight each can stay.
 * Twin: gp.prune(scope=...).
 */
export function pruneMasks(scores, sparsity, scope) {
  const sizes = scores.map((array) => array.length);
  const kept = keptCount(
    sizes.reduce((sum, size) => sum + size, 0),
    sparsity,
  );
  const occupied = sizes.map((size) => Math.min(size, 1));
  const enough = occupied.reduce((sum, one) => sum + one, 0) <= kept;
  const floors = enough ? occupied : sizes.map(() => 0);
  if (scope === "global") return keepOverAll(scores, kept, floors);
  if (scope !== "layer") throw new RangeError(`scope must be "global" or "layer", got ${scope}`);
  const counts = shareOut(sizes, kept, floors, sizes);
  return scores.map((array, a) => keepLargest([array], counts[a])[0]);
}

/** Sets weights to zero where their mask is 0, in place, and returns them. */
export function applyMasks(weights, masks) {
  requireMasks(weights, masks);
  weights.forEach((array, a) => {
    for (let i = 0; i < array.length; i++) if (masks[a][i] === 0) array[i] = 0;
  });
  return weights;
}

/** Throws unless there is a mask for each array, of its length. */
export function requireMasks(weights, masks) {
  const [wanted, given] = [weights, masks].map((arrays) =>
    arrays.map((array) => array.length).join(),
  );
  if (wanted !== given) throw new RangeError(`masks must have lengths ${wanted}, got ${given}`);
}

/** Returns the largest magnitude among the scores whose mask is 0; 0 where all stay. */
export function thresholdOf(scores, masks) {
  let largest = 0;
  scores.forEach((array, a) => {
    for (let i = 0; i < array.length; i++) {
      if (masks[a][i] === 0) largest = Math.max(largest, Math.abs(array[i]));
    }
  });
  return largest;
}

/** All ranked together; an array that would fall below its floor gets it, others share the rest. */
function keepOverAll(scores, kept, floors) {
  const atFloor = new Set();
  for (;;) {
    const free = scores.map((_, a) => a).filter((a) => !atFloor.has(a));
    const left = [...atFloor].reduce((rest, a) => rest - floors[a], kept);
    const found = keepLargest(
      free.map((a) => scores[a]),
      left,
    );
    const short = free.filter((_, at) => found[at].reduce((n, m) => n + m, 0) < floors[free[at]]);
    if (short.length === 0) {
      return scores.map((array, a) =>
        atFloor.has(a) ? keepLargest([array], floors[a])[0] : found[free.indexOf(a)],
      );
    }
    for (const a of short) atFloor.add(a);
  }
}

function joinedScores(scores) {
  const joined = new Float64Array(scores.reduce((sum, array) => sum + array.length, 0));
  let start = 0;
  scores.forEach((array, a) => {
    joined.set(array, start);
    start += array.length;
    if (array.some(Number.isNaN)) throw new RangeError(`scores ${a} contain NaN`);
  });
  return joined;
}

/** Returns the k-th smallest value, k from 1, and reorders the values: Hoare (1961), FIND. */
function kthSmallest(values, k) {
  let [left, right] = [0, values.length - 1];
  while (left < right) {
    const pivot = values[k - 1];
    let [i, j] = [left, right];
    while (i <= j) {
      while (values[i] < pivot) i++;
      while (values[j] > pivot) j--;
      if (i > j) break;
      [values[i], values[j]] = [values[j], values[i]];
      i++;
      j--;
    }
    if (j < k - 1) left = i;
    if (k - 1 < i) right = j;
  }
  return values[k - 1];
}
