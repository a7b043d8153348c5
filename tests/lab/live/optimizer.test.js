import assert from "node:assert/strict";
import { test } from "node:test";
import { createNetwork, flatten } from "../../../src/gradprune/lab/live/network.js";
import { createSgd, sgdStep } from "../../../src/gradprune/lab/live/optimizer.js";
import { assertClose, floats, forEachCase, reference } from "./reference.js";

function trained({ sizes, parameters, gradients, optimizer, masks }, afterStep = () => {}) {
  const net = createNetwork(sizes, "relu", floats(parameters));
  const state = createSgd(net, optimizer);
  const held = masks?.map((mask) => Uint8Array.from(mask));
  for (const numbers of gradients) {
    sgdStep(net, createNetwork(sizes, "relu", floats(numbers)), state, held);
    afterStep(net, state);
  }
  return { net, state };
}

test("twenty steps end where torch's SGD ends, under held masks too", () => {
  forEachCase(reference.sgd, 10, (given) => {
    assert.equal(given.gradients.length, 20);
    assertClose(flatten(trained(given).net), given.after, "parameters");
  });
});

test("velocities are torch's momentum buffers", () => {
  const withMomentum = reference.sgd.filter((given) => given.optimizer.momentum > 0);
  forEachCase(withMomentum, 4, (given) => {
    const { net, state } = trained(given);
    const found = flatten({ ...net, ...state.velocities });
    assertClose(found, given.velocities, "velocities");
  });
});

test("pruned weights and their velocities are zero after every step, kept ones move", () => {
  const held = reference.sgd.filter((given) => given.masks !== null);
  forEachCase(held, 4, (given) => {
    const moved = trained(given, (net, state) => {
      given.masks.forEach((mask, layer) => {
        mask.forEach((kept, i) => {
          assert.equal(net.weights[layer][i] !== 0, kept === 1);
          if (kept === 0) assert.equal(state.velocities.weights[layer][i], 0);
        });
      });
    });
    assert.ok(moved.net.biases.every((biases) => biases.every((b) => b !== 0)));
  });
});

test("momentum and decay are zero unless given", () => {
  const net = createNetwork([1, 1], "relu", floats([2, 1]));
  const state = createSgd(net, { rate: 0.5 });
  const gradients = { weights: [floats([1])], biases: [floats([0])] };
  sgdStep(net, gradients, state);
  sgdStep(net, gradients, state);
  assert.deepEqual([...flatten(net)], [1, 1]);
});

test("bad settings and masks are refused", () => {
  const net = createNetwork([1, 1], "relu", floats([2, 1]));
  assert.throws(() => createSgd(net, { rate: -1 }), /at least 0, got rate -1/);
  assert.throws(() => createSgd(net, {}), /got rate undefined/);
  assert.throws(() => createSgd(net, { rate: 1, momentum: -0.5 }), /momentum -0.5/);
  const state = createSgd(net, { rate: 1 });
  const before = flatten(net);
  const step = () => sgdStep(net, { weights: [floats([1])], biases: [floats([1])] }, state, []);
  assert.throws(step, /masks must have lengths 1, got/);
  assert.deepEqual(flatten(net), before);
});
