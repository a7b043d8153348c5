// What is the loss of a recurrent cell after many steps, and how does its gradient come back through them?
//
// The cell has two parameters and no bend: h_t = w h_{t-1} + b, with the loss (h_T - target)^2.

/** Returns the states h_0 to h_T of the cell; `first` is h_0 and `steps` is T. */
export function unroll([w, b], { steps, first }) {
  const states = new Float64Array(steps + 1);
  states[0] = first;
  for (let t = 1; t <= steps; t++) states[t] = w * states[t - 1] + b;
  return states;
}

/** Returns the loss of the cell. Twin: lab.live.Clip.loss. */
export function cellLoss(parameters, cell) {
  const miss = unroll(parameters, cell)[cell.steps] - cell.target;
  return miss * miss;
}

/**
 * Backpropagation through time: returns the loss, the states, the gradient at each state, dL/dh_t =
 * w dL/dh_{t+1}, and that of w and b, whose every step adds dL/dh_t h_{t-1} and dL/dh_t.
 * Twin: torch's autograd.
 */
export function cellGradient(parameters, cell) {
  const states = unroll(parameters, cell);
  const miss = states[cell.steps] - cell.target;
  const atStates = new Float64Array(cell.steps + 1);
  const gradient = new Float64Array(2);
  atStates[cell.steps] = 2 * miss;
  for (let t = cell.steps; t > 0; t--) {
    gradient[0] += atStates[t] * states[t - 1];
    gradient[1] += atStates[t];
    atStates[t - 1] = atStates[t] * parameters[0];
  }
  return { loss: miss * miss, states, atStates, gradient };
}
