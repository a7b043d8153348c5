// What does each activation do to a number, and how steep is it there?

/** The activations by name: y = value(x), and its derivative as slope(x, y). Those of torch.nn. */
export const ACTIVATIONS = {
  linear: { value: (x) => x, slope: () => 1 },
  relu: { value: (x) => Math.max(x, 0), slope: (x) => (x > 0 ? 1 : 0) },
  tanh: { value: Math.tanh, slope: (_, y) => 1 - y * y },
  sigmoid: { value: (x) => 1 / (1 + Math.exp(-x)), slope: (_, y) => y * (1 - y) },
  gelu: {
    value: (x) => x * normalBelow(x), // Hendrycks and Gimpel (2016)
    slope: (x) => normalBelow(x) + (x * Math.exp((-x * x) / 2)) / Math.sqrt(2 * Math.PI),
  },
};

/** Returns an activation by its name. */
export function activationNamed(name) {
  if (Object.hasOwn(ACTIVATIONS, name)) return ACTIVATIONS[name];
  const known = Object.keys(ACTIVATIONS).join(", ");
  throw new RangeError(`activation must be one of ${known}; got ${name}`);
}

/**
 * Returns the probability that a standard normal number is below x, to 1e-7: Abramowitz and
 * Stegun (1964), 7.1.26, for erfc(|x| / sqrt 2).
 */
function normalBelow(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x) * Math.SQRT1_2);
  const series =
    t *
    (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  const tail = (series * Math.exp((-x * x) / 2)) / 2;
  return x < 0 ? tail : 1 - tail;
}
