import assert from "node:assert/strict";
import { test } from "node:test";
import { generator, normal, shuffled } from "../../../src/gradprune/lab/live/random.js";
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

test("normal numbers are below each quantile as often as they should be", () => {
  const uniform = generator(1);
  const count = 40000;
  const draws = Float64Array.from({ length: count }, () => normal(uniform));
  forEachCase(reference.quantiles, 7, ({ quantile, probability }) => {
    const share = draws.filter((x) => x < quantile).length / count;
    const deviation = Math.sqrt((probability * (1 - probability)) / count);
    assert.ok(Math.abs(share - probability) < 4 * deviation, `${share} instead of ${probability}`);
  });
});

test("successive normal numbers are not correlated", () => {
  const uniform = generator(2);
  const draws = Array.from({ length: 40000 }, () => normal(uniform));
  const products = draws.slice(1).map((x, i) => x * draws[i]);
  const mean = products.reduce((sum, x) => sum + x, 0) / products.length;
  assert.ok(Math.abs(mean) < 4 / Math.sqrt(products.length));
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
