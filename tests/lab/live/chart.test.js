import assert from "node:assert/strict";
import { test } from "node:test";
import {
  placeOn,
  plain,
  powerOfTen,
  powers,
  scientific,
  ticks,
} from "../../../src/gradprune/lab/live/chart.js";

const near = (found, wanted) =>
  assert.ok(Math.abs(found - wanted) < 1e-9, `${found}, not ${wanted}`);

test("a linear axis places values by their share of its length, in either direction", () => {
  const up = placeOn({ from: -2, to: 6 }, 192, 10);
  for (const [value, wanted] of [
    [-2, 192],
    [2, 101],
    [6, 10],
    [8, -35.5],
  ])
    near(up(value), wanted);
});

test("a logarithmic axis gives each power of ten the same length", () => {
  const across = placeOn({ from: 1e-4, to: 1e2, log: true }, 54, 354);
  for (const [value, wanted] of [
    [1e-4, 54],
    [1e-3, 104],
    [1, 254],
    [Math.sqrt(10), 279],
    [1e2, 354],
  ])
    near(across(value), wanted);
  assert.ok(Number.isFinite(across(0)));
});

test("ticks are round and inside the axis", () => {
  assert.deepEqual(ticks(0, 100), [0, 20, 40, 60, 80, 100]);
  assert.deepEqual(ticks(-1, 1), [-1, -0.5, 0, 0.5, 1]);
  assert.deepEqual(powers(1e-2, 1e3), [1e-2, 1, 1e2]);
  assert.deepEqual(powers(0.5, 20), [1, 10]);
});

test("numbers are written as one says them", () => {
  assert.equal(powerOfTen(1e-12), "10⁻¹²");
  assert.equal(scientific(3.2e-13), "3·10⁻¹³");
  assert.equal(plain(0.1 + 0.2), "0.3");
});
