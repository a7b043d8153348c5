import assert from "node:assert/strict";
import { test } from "node:test";
import { ADAM, adamStep, createAdam } from "../../../src/gradprune/lab/live/adam.js";
import { layersNamed } from "../../../src/gradprune/lab/live/kit.js";
import { createLayered, flattenLayered, LAYERED } from "../../../src/gradprune/lab/live/layered.js";
import { createTraining, trainSteps } from "../../../src/gradprune/lab/live/training.js";
import { assertClose, doubles, forEachCase, reference } from "./reference.js";

const networkOf = (layers, numbers) => createLayered(layersNamed(layers), doubles(numbers));
const masksOf = ({ masks }) => masks?.map((mask) => Uint8Array.from(mask)) ?? null;

test("twenty steps at a falling rate end where torch's Adam ends, under held masks too", () => {
  forEachCase(reference.adam, 6, (given) => {
    const net = networkOf(given.layers, given.parameters);
    const state = createAdam(net, given);
    assert.equal(given.gradients.length, 20);
    given.gradients.forEach((numbers, step) => {
      state.rate = given.rate * (1 - step / 20);
      adamStep(net, networkOf(given.layers, numbers), state, masksOf(given));
      given.masks?.forEach((mask, a) => {
        mask.forEach((kept, i) => {
          assert.equal(net.weights[a][i] !== 0, kept === 1);
        });
      });
    });
    assertClose(flattenLayered(net), given.after, "parameters", 1e-9);
  });
});

test("networks of every kind are trained as torch trains them, their masks held", () => {
  forEachCase(reference.trainings, 3, (given) => {
    const net = networkOf(given.layers, given.parameters);
    const training = createTraining({
      ...{ net, inputs: doubles(given.inputs), labels: given.labels, classes: 10, seed: 0 },
      ...{ batch: given.labels.length, passes: LAYERED, method: ADAM, masks: masksOf(given) },
      optimizer: { rate: 0.02 },
    });
    const losses = given.losses.map(() => trainSteps(training, 1));
    assertClose(losses, given.losses, "losses", 1e-9);
    assertClose(flattenLayered(net), given.after, "parameters", 1e-9);
  });
});

test("bad rates, betas and masks are refused", () => {
  const net = networkOf([["dense", 2, 1]], [1, 2, 3]);
  assert.throws(() => createAdam(net, {}), /got rate undefined/);
  assert.throws(() => createAdam(net, { rate: -1 }), /at least 0.*got rate -1/);
  assert.throws(() => createAdam(net, { rate: 1, betas: [0.9, 1] }), /betas 0.9,1/);
  const state = createAdam(net, { rate: 1 });
  assert.throws(() => adamStep(net, net, state, []), /masks must have lengths 2, got/);
  assert.deepEqual([...flattenLayered(net)], [1, 2, 3]);
  assert.equal(state.steps, 0);
});
