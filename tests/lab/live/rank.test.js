import assert from "node:assert/strict";
import { test } from "node:test";
import {
  applyMasks,
  keepLargest,
  keptCount,
  largestScores,
  magnitudeScores,
  pruneMasks,
  thresholdOf,
} from "../../../src/gradprune/lab/live/rank.js";
import { shareOut } from "../../../src/gradprune/lab/live/share.js";
import { arraysOf, floats, forEachCase, listsOf, reference } from "./reference.js";

const SCORES = { magnitude: magnitudeScores, largest: largestScores };

test("the number that stays is the one that Python's round leaves", () => {
  forEachCase(reference.keptCount, 50, ({ total, sparsity, kept }) => {
    assert.equal(keptCount(total, sparsity), kept);
  });
});

test("the k largest are those of keep_largest, ties and zeros of both signs too", () => {
  forEachCase(reference.keepLargest, 40, ({ scores, k, masks }) => {
    const given = arraysOf(scores);
    assert.deepEqual(listsOf(keepLargest(given, k)), masks);
    assert.deepEqual(given, arraysOf(scores)); // the scores keep their order
  });
});

test("masks are those of prune, in both scopes, for small and for large weights", () => {
  forEachCase(reference.prune, 60, ({ weights, sparsity, scope, score, masks }) => {
    const scores = SCORES[score](arraysOf(weights));
    assert.deepEqual(listsOf(pruneMasks(scores, sparsity, scope)), masks);
  });
});

test("shares are those of share_out", () => {
  forEachCase(reference.shareOut, 30, ({ shares, total, low, high, counts }) => {
    assert.deepEqual(shareOut(shares, total, low, high), counts);
  });
});

test("applied masks leave what prune leaves", () => {
  forEachCase(reference.prune, 60, ({ weights, masks, after }) => {
    const given = arraysOf(weights);
    assert.equal(applyMasks(given, masks), given);
    assert.deepEqual(listsOf(given), after);
  });
});

test("the threshold is the largest magnitude that is gone", () => {
  forEachCase(reference.prune, 60, ({ weights, score, masks, gone }) => {
    assert.equal(thresholdOf(SCORES[score](arraysOf(weights)), masks), gone);
  });
});

test("bad numbers, scopes, scores and masks are refused", () => {
  const scores = [floats([1, 2]), floats([3])];
  assert.throws(() => keptCount(10, 1.5), /between 0 and 1, got 1.5/);
  assert.throws(() => keptCount(10, Number.NaN), /between 0 and 1, got NaN/);
  assert.throws(() => keepLargest(scores, 4), /from 0 to 3, got 4/);
  assert.throws(() => keepLargest(scores, -1), /from 0 to 3, got -1/);
  assert.throws(() => keepLargest(scores, 1.5), /from 0 to 3, got 1.5/);
  assert.throws(() => keepLargest([floats([1]), floats([Number.NaN])], 1), /scores 1 contain NaN/);
  assert.throws(() => pruneMasks(scores, 0.5, "row"), /"global" or "layer", got row/);
  assert.throws(() => pruneMasks(scores, -0.5, "layer"), /between 0 and 1, got -0.5/);
  assert.throws(() => shareOut([1, 1], 5, [0, 0], [2, 2]), /add up to 0 and 4/);
  assert.throws(() => applyMasks(scores, [[1, 0]]), /lengths 2,1, got 2/);
  assert.deepEqual(scores, [floats([1, 2]), floats([3])]);
});
