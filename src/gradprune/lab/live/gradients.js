// How is a gradient bounded, or its small entries left out, before the step?
//
// A gradient is a list of Float32Arrays (or Float64Arrays), taken as one vector: `all` of what `backward` returns.
// What changes it reads all of it first, and throws where an entry is not finite.

import { keepLargest, magnitudeScores, roundHalfEven } from "./rank.js";

/** Returns the Euclidean norm. */
export function norm(arrays) {
  let sum = 0;
  for (const array of arrays) for (let i = 0; i < array.length; i++) sum += array[i] * array[i];
  return Math.sqrt(sum);
}

/** Returns the Euclidean distance of two arrays of one length. */
export function distance(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += (a[i] - b[i]) ** 2;
  return Math.sqrt(sum);
}

/** Bounds every entry to [-limit, limit]. Twin: gp.clip_by_value_. */
export function clipByValue(arrays, limit) {
  requireAmount("limit", limit, limit > 0);
  requireFinite(arrays);
  for (const array of arrays) {
    const most = array instanceof Float32Array ? floatAtMost(limit) : limit;
    for (let i = 0; i < array.length; i++) array[i] = Math.min(Math.max(array[i], -most), most);
  }
}

/**
 * Scales all entries by maxNorm / (norm + 1e-6) where the norm is above maxNorm; returns the norm
 * before. Twin: gp.clip_by_norm_.
 */
export function clipByNorm(arrays, maxNorm) {
  requireAmount("maxNorm", maxNorm, maxNorm > 0);
  const before = requireFinite(arrays);
  if (before > maxNorm) {
    const factor = maxNorm / (before + 1e-6);
    for (const array of arrays) for (let i = 0; i < array.length; i++) array[i] *= factor;
  }
  return before;
}

/**
 * Sets entries below a threshold in magnitude to zero; returns the share kept.
 * Twin: gp.threshold_gradients_.
 */
export function hardThreshold(arrays, threshold) {
  requireAmount("threshold", threshold, threshold >= 0);
  requireFinite(arrays);
  return shareOf(
    arrays,
    arrays.map((array) => zeroBelow(array, threshold)),
  );
}

/**
 * As `hardThreshold`, with `ratio` times each array's mean magnitude as its threshold.
 * Twin: gp.threshold_gradients_(ratio=...).
 */
export function ratioThreshold(arrays, ratio) {
  requireAmount("ratio", ratio, ratio >= 0);
  requireFinite(arrays);
  return shareOf(
    arrays,
    arrays.map((array) => zeroBelow(array, ratio * meanMagnitude(array))),
  );
}

/** Returns the residuals of error feedback before its first step: nothing waits. */
export function createFeedback(arrays) {
  return arrays.map((array) => new Float32Array(array.length));
}

/**
 * Keeps the `density` largest entries by magnitude, at least one unless density is 0, and returns
 * the share kept. With residuals, what waits there is added first, and what is not sent waits on.
 * Twins: gp.keep_top_gradients_, and gp.ErrorFeedback(density=...) with residuals.
 */
export function topFraction(arrays, density, residuals = null) {
  requireAmount("density", density, density >= 0 && density <= 1);
  const sums = residuals
    ? arrays.map((array, a) => array.map((g, i) => g + residuals[a][i]))
    : arrays;
  requireFinite(sums);
  const total = arrays.reduce((sum, array) => sum + array.length, 0);
  const count = density === 0 ? 0 : Math.max(roundHalfEven(density * total), Math.min(1, total));
  const masks = keepLargest(magnitudeScores(sums), count);
  masks.forEach((mask, a) => {
    for (let i = 0; i < mask.length; i++) {
      const sum = sums[a][i];
      arrays[a][i] = mask[i] === 1 ? sum : 0;
      if (residuals) residuals[a][i] = mask[i] === 1 ? 0 : sum;
    }
  });
  return total === 0 ? 1 : count / total;
}

function zeroBelow(array, threshold) {
  if (threshold === 0) return array.length;
  let kept = 0;
  for (let i = 0; i < array.length; i++) {
    if (Math.abs(array[i]) >= threshold) kept++;
    else array[i] = 0;
  }
  return kept;
}

function meanMagnitude(array) {
  let sum = 0;
  for (let i = 0; i < array.length; i++) sum += Math.abs(array[i]);
  return sum / array.length;
}

function shareOf(arrays, kept) {
  const add = (sum, x) => sum + x;
  const total = arrays.map((array) => array.length).reduce(add, 0);
  return total === 0 ? 1 : kept.reduce(add, 0) / total;
}

/** The largest number of single precision that is not above a positive limit. */
function floatAtMost(limit) {
  const nearest = Float32Array.of(limit);
  if (nearest[0] > limit) new Int32Array(nearest.buffer)[0]--;
  return nearest[0];
}

function requireAmount(name, amount, fits) {
  const wanted = { limit: "positive", maxNorm: "positive", density: "between 0 and 1" };
  if (!fits) throw new RangeError(`${name} must be ${wanted[name] ?? "at least 0"}, got ${amount}`);
}

/** Returns the norm; squares of single precision cannot leave the range of a double. */
function requireFinite(arrays) {
  const size = norm(arrays);
  if (!Number.isFinite(size)) throw new RangeError("the gradient has a NaN or infinite entry");
  return size;
}
