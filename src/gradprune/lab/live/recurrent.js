// What does a network remember that reads a sequence step by step?

import { backwardDense, turningRoom } from "./dense.js";
import { multiplyTransposed, transpose } from "./matrix.js";

/**
 * Returns a recurrent layer: h = tanh(W_ih x + b_ih + W_hh h' + b_hh) with h' the state before and
 * zero at first, over `steps` inputs of `inputs` numbers; what it gives is the last state, of `width`.
 * Twin: torch.nn.RNN.
 */
export function recurrentLayer(inputs, width, steps) {
  const shapeOf = (rows, from) => ({ rows: rows * steps, from, to: width });
  // Between examples one after the other, and steps one after the other.
  const turn = (given, rows, byStep, out) => {
    for (let row = 0; row < rows; row++) {
      for (let t = 0; t < steps; t++) {
        for (let i = 0; i < inputs; i++) {
          const [example, step] = [(row * steps + t) * inputs + i, (t * rows + row) * inputs + i];
          if (byStep) out[step] = given[example];
          else out[example] = given[step];
        }
      }
    }
  };
  return {
    from: inputs * steps,
    to: width,
    parameters: [
      ["weights", width * inputs],
      ["weights", width * width],
      ["biases", width],
      ["biases", width],
    ],
    room: (rows) => ({
      seen: new Float64Array(rows * steps * inputs),
      states: new Float64Array(rows * (steps + 1) * width),
      deltas: new Float64Array(rows * steps * width),
      carried: new Float64Array(rows * width),
      turnedState: new Float64Array(width * width),
      turned: turningRoom(shapeOf(rows, Math.max(inputs, width))),
    }),
    forward([input, state, inputBias, stateBias], given, rows, { seen, states, carried, out }) {
      const size = rows * width;
      turn(given, rows, true, seen);
      states.fill(0, 0, size);
      const after = states.subarray(size, size * (steps + 1));
      multiplyTransposed(seen, input, inputBias, rows * steps, width, inputs, after);
      for (let t = 0; t < steps; t++) {
        const before = states.subarray(t * size, (t + 1) * size);
        multiplyTransposed(before, state, stateBias, rows, width, width, carried);
        for (let i = 0; i < size; i++)
          after[t * size + i] = Math.tanh(after[t * size + i] + carried[i]);
      }
      out.set(after.subarray((steps - 1) * size));
    },
    backward([input, state], _, rows, room, delta, gradients, below) {
      const { seen, states, deltas, carried, turnedState, turned } = room;
      const size = rows * width;
      transpose(state, width, width, turnedState);
      carried.set(delta.subarray(0, size));
      for (let t = steps - 1; t >= 0; t--) {
        const here = deltas.subarray(t * size, (t + 1) * size);
        for (let i = 0; i < size; i++) {
          const h = states[(t + 1) * size + i];
          here[i] = carried[i] * (1 - h * h);
        }
        multiplyTransposed(here, turnedState, null, rows, width, width, carried);
      }
      const [ofInput, ofState, ofInputBias, ofStateBias] = gradients;
      backwardDense(
        ...[deltas, states, state, shapeOf(rows, width), [ofState, ofStateBias], null, turned],
      );
      const into = below === null ? null : seen;
      backwardDense(
        ...[deltas, seen, input, shapeOf(rows, inputs), [ofInput, ofInputBias], into, turned],
      );
      if (below !== null) turn(seen, rows, false, below);
    },
  };
}
