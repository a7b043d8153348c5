import assert from "node:assert/strict";
import { test } from "node:test";
import { crossEntropy, squaredLoss } from "../../../src/gradprune/lab/live/losses.js";
import { assertClose, floats, forEachCase, reference } from "./reference.js";

test("cross entropy and its gradient are those of torch", () => {
  forEachCase(reference.crossEntropy, 4, ({ logits, labels, classes, loss, gradient }) => {
    const found = new Float32Array(logits.length);
    assertClose([crossEntropy(floats(logits), labels, classes, found)], [loss], "loss");
    assertClose(found, gradient, "gradient");
  });
});

test("squared loss and its gradient are those of torch", () => {
  forEachCase(reference.squaredLoss, 2, ({ outputs, targets, loss, gradient }) => {
    const found = new Float32Array(outputs.length);
    assertClose([squaredLoss(floats(outputs), floats(targets), found)], [loss], "loss");
    assertClose(found, gradient, "gradient");
  });
});

test("labels and targets that do not fit are refused", () => {
  const [logits, gradient] = [new Float32Array(4), new Float32Array(4)];
  assert.throws(() => crossEntropy(logits, [0, 2], 2, gradient), /from 0 to 1, got 2/);
  assert.throws(() => crossEntropy(logits, [-1, 0], 2, gradient), /from 0 to 1, got -1/);
  assert.throws(() => crossEntropy(logits, [0], 2, gradient), /4 logits and 1 labels/);
  assert.throws(() => crossEntropy(logits, [0, 0], 3, gradient), /3 logits and a label/);
  assert.throws(() => squaredLoss(logits, new Float32Array(3), gradient), /got 4 and 3/);
});
