import assert from "node:assert/strict";
import { test } from "node:test";
import { generator, shuffled } from "../../../src/gradprune/lab/live/random.js";
import { forEachCase, reference } from "./reference.js";

test("uniform numbers are those of the published generator", () => {
  forEachCase(reference.uniform, 5, ({ seed, numbers }) => {
    const uniform = generator(seed);
    assert.deepEqual(
      numbers.map(() => uniform()),
      numbers,
    );
  });
});

test("a seed that is no whole number is refused", () => {
  assert.throws(() => generator(0.5), /seed must be a whole number, got 0.5/);
});

test("shuffling gives each permutation equally often", () => {
  const uniform = generator(3);
  const seen = new Map();
  for (let i = 0; i < 24000; i++) {
    const order = shuffled(4, uniform).join();
    seen.set(order, (seen.get(order) ?? 0) + 1);
  }
  assert.equal(seen.size, 24);
  for (const [order, count] of seen) {
    assert.deepEqual(order.split(",").map(Number).sort(), [0, 1, 2, 3]);
    assert.ok(Math.abs(count - 1000) < 4.5 * Math.sqrt(1000), `${order} came ${count} times`);
  }
});

test("nothing and one thing can be shuffled", () => {
  assert.deepEqual([...shuffled(0, generator(0))], []);
  assert.deepEqual([...shuffled(1, generator(0))], [0]);
});
