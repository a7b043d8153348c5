import assert from "node:assert/strict";
import { test } from "node:test";
import { layersNamed } from "../../../src/gradprune/lab/live/kit.js";
import {
  copyLayered,
  createLayered,
  flattenLayered,
  LAYERED,
} from "../../../src/gradprune/lab/live/layered.js";
import { assertClose, doubles, floats, forEachCase, reference } from "./reference.js";

const networkOf = ({ layers, parameters }) =>
  createLayered(layersNamed(layers), doubles(parameters));

// A layer alone, as a network runs it, with the gradient of its inputs, which a network has no use for.
function alone(given, room) {
  const { rows, inputs, upstream } = given;
  const [net, x] = [networkOf(given), doubles(inputs)];
  const work = LAYERED.createWorkspace(net, room);
  const out = LAYERED.forward(net, x, rows, work).slice();
  const below = new Float64Array(room * net.sizes[0]).fill(7);
  const gradients = work.gradients.parameters[0];
  const [layer] = net.layers;
  layer.backward(net.parameters[0], x, rows, work.rooms[0], doubles(upstream), gradients, below);
  return { out, gradients, below: below.subarray(0, rows * net.sizes[0]) };
}

function passes(given, room) {
  const net = networkOf(given);
  const [work, inputs] = [LAYERED.createWorkspace(net, room), doubles(given.inputs)];
  const out = LAYERED.forward(net, inputs, given.rows, work).slice();
  const gradients = LAYERED.backward(net, inputs, given.rows, work, doubles(given.upstream));
  return { net, out, gradients };
}

test("what each layer gives is what torch's gives", () => {
  forEachCase(reference.layers, 40, (given) => {
    assertClose(alone(given, given.rows).out, given.out, "output", 1e-6);
  });
});

test("the gradients of each layer's parameters and inputs are those of torch", () => {
  forEachCase(reference.layers, 40, (given) => {
    const { gradients, below } = alone(given, given.rows);
    assert.equal(gradients.length, given.gradients.length);
    gradients.forEach((array, i) => {
      assertClose(array, given.gradients[i], `gradient ${i}`, 1e-6);
    });
    assertClose(below, given.below, "gradient of the inputs", 1e-6);
  });
});

test("networks of several layers answer and learn as torch's do", () => {
  forEachCase(reference.layered, 4, (given) => {
    const { net, out, gradients } = passes(given, given.rows);
    assertClose(out, given.out, "logits", 1e-9);
    assert.equal(gradients.all.length, given.gradients.length);
    gradients.all.forEach((array, i) => {
      assertClose(array, given.gradients[i], `gradient ${i}`, 1e-9);
    });
    assert.deepEqual(
      net.weights.map((array) => array.length),
      given.weights,
    );
    const found = new Set([...gradients.weights, ...gradients.biases]);
    assert.deepEqual(found, new Set(gradients.all));
  });
});

test("a workspace with room for more rows, and a second pass, give the same", () => {
  forEachCase([...reference.layered, ...reference.layers], 40, (given) => {
    const [exact, roomy] = [passes(given, given.rows), passes(given, given.rows + 3)];
    assert.deepEqual(roomy.out, exact.out);
    assert.deepEqual(roomy.gradients.all, exact.gradients.all);
    const work = LAYERED.createWorkspace(exact.net, given.rows);
    for (let pass = 0; pass < 2; pass++) {
      const inputs = doubles(given.inputs);
      assert.deepEqual(LAYERED.forward(exact.net, inputs, given.rows, work), exact.out);
      LAYERED.backward(exact.net, inputs, given.rows, work, doubles(given.upstream));
      assert.deepEqual(work.gradients.all, exact.gradients.all);
    }
  });
});

test("what a workspace was used for before, with more or fewer rows, is forgotten", () => {
  forEachCase([...reference.layered, ...reference.layers], 40, (given) => {
    const work = LAYERED.createWorkspace(networkOf(given), given.rows);
    const [inputs, upstream] = [doubles(given.inputs), doubles(given.upstream)];
    for (const rows of [1, given.rows, 1]) {
      const { net, out, gradients } = passes({ ...given, rows }, rows);
      assert.deepEqual(LAYERED.forward(net, inputs, rows, work), out);
      assert.deepEqual(LAYERED.backward(net, inputs, rows, work, upstream).all, gradients.all);
    }
  });
});

test("parameters go in and out in torch's order, and a copy shares no memory", () => {
  forEachCase(reference.layered, 4, (given) => {
    const net = networkOf(given);
    assert.deepEqual([...flattenLayered(net)], given.parameters);
    const copy = copyLayered(net);
    copy.weights[0][0] += 1;
    copy.biases.at(-1)[0] += 1;
    assert.deepEqual([...flattenLayered(net)], given.parameters);
    assert.notDeepEqual(flattenLayered(copy), flattenLayered(net));
  });
});

test("layers that do not fit, unknown ones, and wrong counts are refused", () => {
  const none = floats([]);
  assert.throws(() => layersNamed([["pool", 3]]), /one of dense, .*attention; got pool/);
  assert.throws(() => layersNamed([["attention", 6, 4, 2]]), /4 heads cannot share 6/);
  const window = { kernel: 5, stride: 1, padding: 0 };
  assert.throws(() => layersNamed([["convolution", 1, 1, 3, window]]), /5 leave nothing .* 3/);
  const two = layersNamed([
    ["dense", 2, 3],
    ["dense", 4, 1],
  ]);
  assert.throws(() => createLayered(two, none), /layer 1 takes 4 numbers, layer 0 gives 3/);
  const one = layersNamed([["dense", 2, 1]]);
  assert.throws(() => createLayered(one, floats([1, 2])), /3 parameters, got 2/);
  const net = createLayered(one, floats([1, 2, 3]));
  const work = LAYERED.createWorkspace(net, 2);
  assert.throws(() => LAYERED.forward(net, floats([1, 2, 3]), 2, work), /4 inputs, got 3/);
  assert.throws(() => LAYERED.forward(net, new Float64Array(6), 3, work), /2 rows, got 3/);
});
