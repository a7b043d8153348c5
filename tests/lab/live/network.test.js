import assert from "node:assert/strict";
import { test } from "node:test";
import {
  assign,
  backward,
  copyNetwork,
  createNetwork,
  createWorkspace,
  flatten,
  forward,
  parameterCount,
  predictions,
} from "../../../src/gradprune/lab/live/network.js";
import { generator } from "../../../src/gradprune/lab/live/random.js";
import { assertClose, floats, forEachCase, reference } from "./reference.js";

function passes({ sizes, activation, parameters, inputs, rows, upstream }, room) {
  const net = createNetwork(sizes, activation, floats(parameters));
  const work = createWorkspace(net, room);
  const logits = Float32Array.from(forward(net, floats(inputs), rows, work));
  const gradients = backward(net, floats(inputs), rows, work, floats(upstream));
  return { net, work, logits, gradients };
}

test("logits are those of torch", () => {
  forEachCase(reference.networks, 10, (given) => {
    assertClose(passes(given, given.rows).logits, given.logits, "logits");
  });
});

test("gradients of every weight and bias are those of torch", () => {
  forEachCase(reference.networks, 10, (given) => {
    const { gradients } = passes(given, given.rows);
    gradients.all.forEach((array, i) => {
      assertClose(array, given.gradients[i], `gradient ${i}`);
    });
    assert.equal(gradients.all.length, given.gradients.length);
    gradients.weights.forEach((array, layer) => {
      assert.equal(array, gradients.all[2 * layer]);
      assert.equal(gradients.biases[layer], gradients.all[2 * layer + 1]);
    });
  });
});

test("gradients at the layers' outputs are those of torch", () => {
  forEachCase(reference.networks, 10, (given) => {
    const { work } = passes(given, given.rows);
    assert.equal(work.deltas.length, given.deltas.length);
    work.deltas.forEach((array, layer) => {
      assertClose(array, given.deltas[layer], `layer ${layer}`);
    });
  });
});

test("a workspace with room for more rows gives the same", () => {
  forEachCase(reference.networks, 10, (given) => {
    const [exact, roomy] = [passes(given, given.rows), passes(given, given.rows + 3)];
    assert.deepEqual(roomy.logits, exact.logits);
    assert.deepEqual(roomy.gradients, exact.gradients);
  });
});

test("a second pass gives the same as the first", () => {
  forEachCase(reference.networks, 10, (given) => {
    const { net, work, logits, gradients } = passes(given, given.rows);
    const first = gradients.all.map((array) => array.slice());
    assert.deepEqual(forward(net, floats(given.inputs), given.rows, work), logits);
    backward(net, floats(given.inputs), given.rows, work, floats(given.upstream));
    assert.deepEqual(gradients.all, first);
  });
});

test("predictions are those of torch", () => {
  forEachCase(reference.networks, 10, (given) => {
    const classes = given.sizes.at(-1);
    const logits = floats(given.logits);
    assert.deepEqual([...predictions(logits, classes)], given.predictions);
  });
});

test("of equal logits the first class is predicted", () => {
  assert.deepEqual([...predictions(floats([0, 2, 2, -1, -1, -1]), 3)], [1, 0]);
});

test("parameters go in and out in torch's order", () => {
  forEachCase(reference.networks, 10, ({ sizes, activation, parameters }) => {
    const net = createNetwork(sizes, activation, floats(parameters));
    assert.deepEqual([...flatten(net)], parameters);
    assert.equal(parameterCount(sizes), parameters.length);
  });
});

test("a copy shares no memory", () => {
  const uniform = generator(0);
  const net = createNetwork([3, 4, 2], "tanh", new Float32Array(26).map(uniform));
  const copy = copyNetwork(net);
  assert.deepEqual(copy, net);
  copy.weights[0][0] += 1;
  copy.biases[1][0] += 1;
  assert.notEqual(copy.weights[0][0], net.weights[0][0]);
  assert.notEqual(copy.biases[1][0], net.biases[1][0]);
});

test("a network that is assigned another's parameters shares no memory with it", () => {
  const uniform = generator(1);
  const [net, other] = [0, 1].map(() =>
    createNetwork([3, 4, 2], "relu", new Float32Array(26).map(uniform)),
  );
  assert.notDeepEqual(flatten(net), flatten(other));
  assign(net, other);
  assert.deepEqual(flatten(net), flatten(other));
  other.weights[1][0] += 1;
  assert.notEqual(net.weights[1][0], other.weights[1][0]);
});

test("bad networks and inputs are refused", () => {
  assert.throws(
    () => createNetwork([2, 1], "swish", new Float32Array(3)),
    /one of linear, .*swish/,
  );
  assert.throws(() => createNetwork([2, 1], "relu", new Float32Array(4)), /3 parameters, got 4/);
  const net = createNetwork([2, 1], "relu", new Float32Array(3));
  const work = createWorkspace(net, 2);
  assert.throws(() => forward(net, new Float32Array(6), 3, work), /2 rows, got 3/);
  assert.throws(() => forward(net, new Float32Array(3), 2, work), /4 inputs, got 3/);
  assert.throws(() => backward(net, new Float32Array(6), 3, work, new Float32Array(3)), /got 3/);
});
