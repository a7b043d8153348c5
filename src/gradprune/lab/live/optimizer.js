// How does a gradient move the weights, and what keeps the pruned ones at zero?

import { applyMasks, requireMasks } from "./rank.js";

/**
 * Returns the state of gradient descent on a network: its rate, momentum and decay, which may be
 * changed between steps, and one velocity a parameter.
 */
export function createSgd(net, { rate, momentum = 0, decay = 0 }) {
  const inRange = rate >= 0 && momentum >= 0 && decay >= 0;
  if (!inRange) {
    const given = `rate ${rate}, momentum ${momentum}, decay ${decay}`;
    throw new RangeError(`rate, momentum and decay must be numbers of at least 0, got ${given}`);
  }
  const zeros = (arrays) => arrays.map((array) => new Float32Array(array.length));
  const velocities = { weights: zeros(net.weights), biases: zeros(net.biases) };
  return { rate, momentum, decay, velocities };
}

/**
 * Steps every parameter p of gradient g: v = momentum v + (g + decay p), then p = p - rate v.
 * Where a mask is 0, the weight and its velocity are 0 after the step.
 * Twin: torch.optim.SGD, under gp.Masks.hold.
 */
export function sgdStep(net, gradients, state, masks = null) {
  if (masks) requireMasks(net.weights, masks);
  for (const kind of ["weights", "biases"]) {
    net[kind].forEach((parameters, layer) => {
      descend(parameters, gradients[kind][layer], state.velocities[kind][layer], state);
    });
  }
  if (masks) {
    applyMasks(net.weights, masks);
    applyMasks(state.velocities.weights, masks);
  }
}

/** What training.js needs to know of it, unless it is told of another. */
export const SGD = { create: createSgd, step: sgdStep };

/** The step of one array: v = momentum v + (g + decay p), then p = p - rate v. */
export function descend(parameters, gradients, velocities, { rate, momentum, decay }) {
  for (let i = 0; i < parameters.length; i++) {
    velocities[i] = momentum * velocities[i] + gradients[i] + decay * parameters[i];
    parameters[i] -= rate * velocities[i];
  }
}
