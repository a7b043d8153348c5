import assert from "node:assert/strict";
import { test } from "node:test";
import {
  averageWhenDue,
  branchCrew,
  createCrew,
  crewStep,
  differing,
  heads,
  keepers,
  pruneCrew,
  WORKERS,
  zeros,
} from "../../../src/gradprune/lab/live/crew.js";
import { createNetwork, flatten } from "../../../src/gradprune/lab/live/network.js";
import { assertClose, floats, forEachCase, listsOf, reference } from "./reference.js";

function crewOf(given, options = {}) {
  const { sizes, parameters, inputs, labels, optimizer, made } = given;
  return createCrew({
    net: createNetwork(sizes, "relu", floats(parameters)),
    inputs: floats(inputs),
    labels,
    classes: sizes.at(-1),
    optimizer,
    ...made,
    ...options,
  });
}

const numbersOf = ({ workers }) => workers.map(({ net }) => [...flatten(net)]);

test("workers step, send, average, prune and hold as gradprune's do", () => {
  forEachCase(reference.crews, 12, (given) => {
    const crew = crewOf(given);
    const [averaged, differ, alive] = [[], [], []];
    for (let step = 0; step < given.steps; step++) {
      if (step === given.steps / 2) pruneCrew(crew, given.sparsity, given.decides);
      crewStep(crew);
      averaged.push(averageWhenDue(crew));
      if (step < given.steps / 2) continue;
      differ.push(differing(crew));
      alive.push(zeros(crew));
    }
    assert.deepEqual(averaged, given.averaged);
    assert.deepEqual(differ, given.differ);
    assert.deepEqual(alive, given.zeros);
    crew.workers.forEach(({ masks, net }, p) => {
      assert.deepEqual(listsOf(masks), given.masks[p]);
      assertClose(flatten(net), given.after[p], `worker ${p}`);
    });
  });
});

test("a copy goes on by itself, from the same weights, velocities and rests", () => {
  forEachCase(reference.crews, 12, (given) => {
    const crew = crewOf(given);
    for (let step = 0; step < 3; step++) {
      crewStep(crew);
      averageWhenDue(crew);
    }
    // After three batches an epoch is over, so that a copy of the same seed goes on as the first one began.
    const copies = [branchCrew(crew, 5), branchCrew(crew, 5)];
    assert.deepEqual(numbersOf(copies[0]), numbersOf(crew));
    assert.equal(copies[0].bytes, crew.bytes);
    const before = numbersOf(crew);
    for (const copy of copies) {
      for (let step = 0; step < 4; step++) {
        crewStep(copy);
        averageWhenDue(copy);
      }
    }
    assert.deepEqual(numbersOf(crew), before);
    assert.notDeepEqual(numbersOf(copies[0]), before);
    assert.deepEqual(numbersOf(copies[0]), numbersOf(copies[1]));
    for (const { waiting, late } of copies[0].workers) {
      assert.equal(waiting === null && late === null, given.made.density === 1);
    }
  });
});

test("those who share weights are named once, and a weight's keepers are counted", () => {
  const count = { synchronous: 1, local: WORKERS, pairs: 2, asynchronous: 1 };
  forEachCase(reference.crews, 12, (given) => {
    const crew = crewOf(given);
    crewStep(crew);
    assert.equal(heads(crew).length, count[given.made.way]);
    const own = new Set(numbersOf(crew).map(String));
    assert.equal(own.size, count[given.made.way]);
    assert.ok(keepers(crew, 0).every((kept) => kept === WORKERS));
    pruneCrew(crew, given.sparsity, given.decides);
    const sums = crew.workers[0].masks[0].map((_, i) =>
      crew.workers.reduce((sum, { masks }) => sum + masks[0][i], 0),
    );
    assert.deepEqual([...keepers(crew, 0)], [...sums]);
  });
});

test("an unknown way, a period of no step, an age below 0 and batches too small are refused", () => {
  const [given] = reference.crews;
  assert.throws(() => crewOf(given, { way: "ring" }), /way must be one of .*; got ring/);
  assert.throws(() => crewOf(given, { period: 0 }), /period must be .*, got 0/);
  assert.throws(() => crewOf(given, { age: -1 }), /age must be .*, got -1/);
  assert.throws(() => crewOf(given, { batch: 12 }), /at most 2, got 0 of 4/);
});
