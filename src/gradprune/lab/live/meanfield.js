// By which factor does a wide random layer multiply the gradient? Equations 1.5 and 1.6 of chapter 1, layer by layer.
import { activationNamed } from "./activation.js";

const NODES = 400; // even: none lies at 0, where some activations have a corner
const REACH = 8; // standard deviations on either side

/** Returns E[f(z)] for a standard normal z. */
export function normalMean(f) {
  let [sum, total] = [0, 0];
  for (let i = 0; i < NODES; i++) {
    const z = REACH * ((2 * i) / (NODES - 1) - 1);
    const weight = Math.exp((-z * z) / 2);
    sum += weight * f(z);
    total += weight;
  }
  return sum / total;
}

/**
 * Returns for each of `depth` layers the factor chi by which the expected squared gradient is
 * multiplied on its way from the layer's output to its input: weights of variance scale^2 / n, no
 * biases, and inputs of mean square `square`.
 */
export function gradientFactors(activation, scale, depth, square) {
  const { value, slope } = activationNamed(activation);
  const factors = [];
  let q = scale ** 2 * square;
  for (let layer = 0; layer < depth; layer++) {
    const deviation = Math.sqrt(q);
    factors.push(scale ** 2 * normalMean((z) => slope(deviation * z, value(deviation * z)) ** 2));
    q = scale ** 2 * normalMean((z) => value(deviation * z) ** 2);
  }
  return factors;
}
