// What do torch and gradprune say, and how is that compared with? Read by the tests here.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";

/** What tests/lab/live/test_arithmetic.py wrote. */
export const reference = JSON.parse(readFileSync(process.env.GRADPRUNE_REFERENCE, "utf8"));

export const floats = (numbers) => Float32Array.from(numbers);
export const doubles = (numbers) => Float64Array.from(numbers);
export const arraysOf = (lists) => lists.map(floats);
export const listsOf = (arrays) => arrays.map((array) => [...array]);

/** Asserts that no number is further from the wanted one than `share` of the largest of them. */
export function assertClose(found, wanted, what, share = 1e-5) {
  assert.equal(found.length, wanted.length, `${what}: how many numbers`);
  assert.ok(wanted.length > 0, `${what}: nothing to compare`);
  const largest = wanted.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
  wanted.forEach((number, i) => {
    const near = Math.abs(found[i] - number) <= share * largest;
    assert.ok(near, `${what}: number ${i} is ${found[i]}, not ${number}`);
  });
}

/** Runs `check` for each case, of which there must be some, and says which one failed. */
export function forEachCase(cases, least, check) {
  assert.ok(cases.length >= least, `${cases.length} cases, at least ${least} wanted`);
  for (const given of cases) {
    try {
      check(given);
    } catch (error) {
      error.message = `${given.name}: ${error.message}`;
      throw error;
    }
  }
}
