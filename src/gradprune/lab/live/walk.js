// Where does gradient descent go in a few parameters, how long is each step, and which way does it point?

import { descend } from "./optimizer.js";

/**
 * Walks from `start` by v = momentum v + clip(g), p = p - rate v, for `steps` steps or until the loss
 * or its gradient is no longer finite. `lossAt(p)` returns { loss, gradient }; `clip` changes a list
 * of one array. Returns the points and their losses, and for each step its length and its angle, in
 * degrees, to the steepest descent where it began. Twin: lab.live.Clip.walk.
 */
export function walk(lossAt, start, { steps, rate, momentum = 0, clip = () => {} }) {
  const at = Float64Array.from(start);
  const velocity = new Float64Array(at.length);
  const taken = { points: [], losses: [], lengths: [], angles: [] };
  for (;;) {
    const { loss, gradient } = lossAt(at);
    taken.points.push([...at]);
    taken.losses.push(loss);
    const finite = Number.isFinite(loss) && gradient.every(Number.isFinite);
    if (!finite || taken.points.length > steps) return { ...taken, finite };
    const clipped = Float64Array.from(gradient);
    clip([clipped]);
    descend(at, clipped, velocity, { rate, momentum, decay: 0 });
    taken.lengths.push(rate * Math.hypot(...velocity));
    taken.angles.push(angleBetween(velocity, gradient));
  }
}

/** Returns the angle between two vectors in degrees, exact for small ones too; 0 where one is zero. */
export function angleBetween(a, b) {
  const [p, q] = [unit(a), unit(b)];
  const apart = Math.hypot(...p.map((x, i) => x - q[i]));
  const along = Math.hypot(...p.map((x, i) => x + q[i]));
  return (2 * Math.atan2(apart, along) * 180) / Math.PI;
}

function unit(vector) {
  const length = Math.hypot(...vector);
  return Array.from(vector, (x) => (length > 0 ? x / length : 0));
}
