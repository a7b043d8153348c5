// How are vectors brought to mean 0 and variance 1, and how does a loss see through that?

const EPSILON = 1e-5; // torch's

/**
 * Writes (x - mean) / deviation times `gain` plus `shift` for each of `rows` vectors, and keeps what
 * `backwardNorm` needs: `plain`, that before gain and shift, and `scales`, 1 / deviation.
 * Twin: torch.nn.LayerNorm.
 */
export function forwardNorm(inputs, [gain, shift], rows, width, { plain, scales }, out) {
  for (let row = 0; row < rows; row++) {
    const start = row * width;
    let sum = 0;
    for (let i = start; i < start + width; i++) sum += inputs[i];
    const mean = sum / width;
    let squares = 0;
    for (let i = start; i < start + width; i++) squares += (inputs[i] - mean) * (inputs[i] - mean);
    const scale = 1 / Math.sqrt(squares / width + EPSILON);
    scales[row] = scale;
    for (let i = 0; i < width; i++) {
      plain[start + i] = (inputs[start + i] - mean) * scale;
      out[start + i] = plain[start + i] * gain[i] + shift[i];
    }
  }
}

/**
 * Adds the gradient of the inputs to `below`, and writes those of gain and shift. With d that of
 * `plain` p: scale (d - mean(d) - p mean(d p)).
 */
export function backwardNorm(delta, [gain], rows, width, { plain, scales }, gradients, below) {
  for (const array of gradients) array.fill(0);
  const [ofGain, ofShift] = gradients;
  for (let row = 0; row < rows; row++) {
    const start = row * width;
    let [mean, along] = [0, 0];
    for (let i = 0; i < width; i++) {
      const d = delta[start + i];
      ofGain[i] += d * plain[start + i];
      ofShift[i] += d;
      mean += (d * gain[i]) / width;
      along += (d * gain[i] * plain[start + i]) / width;
    }
    for (let i = 0; i < width; i++) {
      const d = delta[start + i] * gain[i];
      below[start + i] += scales[row] * (d - mean - plain[start + i] * along);
    }
  }
}
