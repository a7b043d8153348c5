import assert from "node:assert/strict";
import { test } from "node:test";
import {
  clipByNorm,
  clipByValue,
  createFeedback,
  distance,
  hardThreshold,
  norm,
  ratioThreshold,
  topFraction,
} from "../../../src/gradprune/lab/live/gradients.js";
import { arraysOf, assertClose, floats, forEachCase, listsOf, reference } from "./reference.js";

function assertArraysClose(found, wanted) {
  assertClose(listsOf(found).flat(), wanted.flat(), "gradient");
}

test("the norm is that of all entries as one vector", () => {
  forEachCase(reference.clipByNorm, 6, ({ given, before }) => {
    assertClose([norm(arraysOf(given))], [before], "norm");
  });
});

test("the distance is the norm of the difference, without a copy of it", () => {
  const [a, b] = [Float64Array.of(1, 2, -3), Float64Array.of(1, -2, 0)];
  assert.equal(distance(a, b), 5);
  assert.equal(distance(a, a), 0);
});

test("clipping by norm is that of clip_by_norm_", () => {
  forEachCase(reference.clipByNorm, 6, ({ given, maxNorm, before, after, unchanged }) => {
    const arrays = arraysOf(given);
    assertClose([clipByNorm(arrays, maxNorm)], [before], "norm");
    assertArraysClose(arrays, after);
    assert.equal(JSON.stringify(listsOf(arrays)) === JSON.stringify(given), unchanged);
  });
});

test("in double precision the limit of clipping by value is met as it is given", () => {
  const array = Float64Array.of(1, -1, 0.2);
  clipByValue([array], 0.3);
  assert.deepEqual([...array], [0.3, -0.3, 0.2]);
});

test("clipping by value is that of clip_by_value_, bit for bit", () => {
  forEachCase(reference.clipByValue, 6, ({ given, limit, after }) => {
    const arrays = arraysOf(given);
    clipByValue(arrays, limit);
    assert.deepEqual(listsOf(arrays), after);
  });
});

test("a threshold keeps what threshold_gradients_ keeps", () => {
  forEachCase(reference.hardThreshold, 6, ({ given, amount, after, share }) => {
    const arrays = arraysOf(given);
    assert.equal(hardThreshold(arrays, amount), share);
    assert.deepEqual(listsOf(arrays), after);
  });
});

test("a ratio keeps what threshold_gradients_ keeps", () => {
  forEachCase(reference.ratioThreshold, 6, ({ given, amount, after, share }) => {
    const arrays = arraysOf(given);
    assert.equal(ratioThreshold(arrays, amount), share);
    assert.deepEqual(listsOf(arrays), after);
  });
});

test("the largest entries are those of keep_top_gradients_", () => {
  forEachCase(reference.topFraction, 12, ({ given, density, after, share }) => {
    const arrays = arraysOf(given);
    assert.equal(topFraction(arrays, density), share);
    assert.deepEqual(listsOf(arrays), after);
  });
});

test("ten steps of feedback send and keep what ErrorFeedback does, bit for bit", () => {
  forEachCase(reference.feedback, 4, ({ density, steps }) => {
    assert.equal(steps.length, 10);
    const residuals = createFeedback(arraysOf(steps[0].given));
    for (const { given, share, sent, waiting } of steps) {
      const arrays = arraysOf(given);
      assert.equal(topFraction(arrays, density, residuals), share);
      assert.deepEqual(listsOf(arrays), sent);
      assert.deepEqual(listsOf(residuals), waiting);
    }
  });
});

test("of no entries all are kept", () => {
  for (const none of [[], [floats([])]]) {
    assert.equal(norm(none), 0);
    assert.equal(clipByNorm(none, 1), 0);
    assert.equal(hardThreshold(none, 1), 1);
    assert.equal(ratioThreshold(none, 1), 1);
    assert.equal(topFraction(none, 0.5), 1);
  }
});

test("bad amounts and entries that are not finite are refused before anything changes", () => {
  const arrays = [floats([1, 2]), floats([3])];
  assert.throws(() => clipByValue(arrays, 0), /limit must be positive, got 0/);
  assert.throws(() => clipByNorm(arrays, 0), /maxNorm must be positive, got 0/);
  assert.throws(() => clipByValue(arrays, -1), /limit must be positive, got -1/);
  assert.throws(() => hardThreshold(arrays, -1), /threshold must be at least 0, got -1/);
  assert.throws(() => ratioThreshold(arrays, Number.NaN), /ratio must be at least 0, got NaN/);
  assert.throws(() => topFraction(arrays, 2), /density must be between 0 and 1, got 2/);
  assert.deepEqual(arrays, [floats([1, 2]), floats([3])]);
  for (const wrong of [Number.NaN, Number.POSITIVE_INFINITY]) {
    const residuals = createFeedback(arrays);
    for (const change of [
      (g) => clipByNorm(g, 1),
      (g) => clipByValue(g, 1),
      (g) => hardThreshold(g, 1),
      (g) => ratioThreshold(g, 1),
      (g) => topFraction(g, 0.5),
      (g) => topFraction(g, 0.5, residuals),
    ]) {
      const given = [floats([5, 2]), floats([wrong])];
      assert.throws(() => change(given), /NaN or infinite/);
      assert.deepEqual(given, [floats([5, 2]), floats([wrong])]);
    }
    assert.deepEqual(residuals, createFeedback(arrays));
  }
});
