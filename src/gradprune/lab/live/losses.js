// How wrong are a network's outputs, and which way is it less so?

/**
 * Returns the mean over rows of -log softmax(logits)[label], and writes its gradient,
 * (softmax - one-hot) / rows. Twin: torch.nn.functional.cross_entropy.
 */
export function crossEntropy(logits, labels, classes, gradient) {
  const rows = logits.length / classes;
  if (!Number.isInteger(rows) || labels.length < rows) {
    const given = `${logits.length} logits and ${labels.length} labels`;
    throw new RangeError(`each row has ${classes} logits and a label, got ${given}`);
  }
  let loss = 0;
  for (let row = 0; row < rows; row++) {
    const start = row * classes;
    if (!(labels[row] >= 0 && labels[row] < classes)) {
      throw new RangeError(`labels must be from 0 to ${classes - 1}, got ${labels[row]}`);
    }
    loss += softmaxRow(logits, start, classes, gradient) - logits[start + labels[row]];
    for (let c = 0; c < classes; c++) {
      gradient[start + c] = (gradient[start + c] - (c === labels[row] ? 1 : 0)) / rows;
    }
  }
  return loss / rows;
}

/**
 * Writes the softmax of the row of logits that begins at `start` to the same places of `out`, and
 * returns the log of the sum of their exponentials. Twin: torch.softmax and torch.logsumexp.
 */
export function softmaxRow(logits, start, classes, out) {
  let largest = -Infinity; // taken off first, so that no exponential overflows
  for (let c = 0; c < classes; c++) largest = Math.max(largest, logits[start + c]);
  let sum = 0;
  for (let c = 0; c < classes; c++) sum += Math.exp(logits[start + c] - largest);
  for (let c = 0; c < classes; c++) out[start + c] = Math.exp(logits[start + c] - largest) / sum;
  return largest + Math.log(sum);
}

/**
 * Returns the mean of (output - target)^2 over all entries, and writes its gradient.
 * Twin: torch.nn.functional.mse_loss.
 */
export function squaredLoss(outputs, targets, gradient) {
  if (outputs.length !== targets.length) {
    throw new RangeError(`each output has a target, got ${outputs.length} and ${targets.length}`);
  }
  let loss = 0;
  for (let i = 0; i < outputs.length; i++) {
    const difference = outputs[i] - targets[i];
    loss += difference * difference;
    gradient[i] = (2 * difference) / outputs.length;
  }
  return loss / outputs.length;
}
