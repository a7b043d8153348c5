// How is each parameter moved by about as much, however large its gradient is?

import { applyMasks, requireMasks } from "./rank.js";

const EPSILON_ADAM = 1e-8; // torch's

/**
 * Returns the state of Adam on a network: its rate, which may be changed between steps, its decays,
 * and for each parameter the running means of its gradient and of its square.
 */
export function createAdam(net, { rate, betas = [0.9, 0.999] }) {
  if (!(rate >= 0 && betas.every((beta) => beta >= 0 && beta < 1))) {
    const given = `rate ${rate}, betas ${betas}`;
    throw new RangeError(`the rate must be at least 0, and betas from 0 to below 1, got ${given}`);
  }
  const zeros = () => ({
    weights: net.weights.map((array) => new Float64Array(array.length)),
    biases: net.biases.map((array) => new Float64Array(array.length)),
  });
  return { rate, betas, steps: 0, means: zeros(), squares: zeros() };
}

/**
 * Steps every parameter p of gradient g: m = a m + (1 - a) g, v = b v + (1 - b) g^2, then
 * p = p - rate m / (1 - a^t) / (sqrt(v / (1 - b^t)) + 1e-8) at step t. Where a mask is 0, the weight
 * is 0 after the step. Twin: torch.optim.Adam, under gp.Masks.hold.
 */
export function adamStep(net, gradients, state, masks = null) {
  if (masks) requireMasks(net.weights, masks);
  state.steps++;
  for (const kind of ["weights", "biases"]) {
    net[kind].forEach((parameters, a) => {
      const [means, squares] = [state.means[kind][a], state.squares[kind][a]];
      adapt(parameters, gradients[kind][a], means, squares, state);
    });
  }
  if (masks) applyMasks(net.weights, masks);
}

/** What training.js needs to know of it. */
export const ADAM = { create: createAdam, step: adamStep };

function adapt(parameters, gradients, means, squares, { rate, betas: [a, b], steps }) {
  const [ofMean, ofSquare] = [1 - a ** steps, 1 - b ** steps];
  for (let i = 0; i < parameters.length; i++) {
    const g = gradients[i];
    means[i] = a * means[i] + (1 - a) * g;
    squares[i] = b * squares[i] + (1 - b) * g * g;
    const spread = Math.sqrt(squares[i] / ofSquare) + EPSILON_ADAM;
    parameters[i] -= ((rate / ofMean) * means[i]) / spread;
  }
}
