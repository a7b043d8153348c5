import assert from "node:assert/strict";
import { test } from "node:test";
import {
  createNetwork,
  createWorkspace,
  flatten,
  forward,
} from "../../../src/gradprune/lab/live/network.js";
import { magnitudeScores } from "../../../src/gradprune/lab/live/rank.js";
import {
  compressNetwork,
  compressRows,
  forwardRows,
  multiplyRows,
  unitMasks,
  withoutIdleUnits,
} from "../../../src/gradprune/lab/live/sparse.js";
import { assertClose, floats, forEachCase, listsOf, reference } from "./reference.js";

const networkOf = ({ sizes, parameters }) => createNetwork(sizes, "relu", floats(parameters));
const logitsOf = (run, net, { inputs, rows }) =>
  Float32Array.from(run(net, floats(inputs), rows, createWorkspace(net, rows)));

test("rows without zeros are those of torch's CSR matrix", () => {
  forEachCase(reference.sparse, 12, (given) => {
    const { layers, sizes } = compressNetwork(networkOf(given));
    layers.forEach(({ starts, places, values }, layer) => {
      const wanted = given.layers[layer];
      assert.deepEqual([[...starts], [...places]], [wanted.starts, wanted.places]);
      assert.deepEqual([...values], wanted.values);
      assert.equal(starts.length, sizes[layer + 1] + 1);
    });
  });
});

test("a network by rows answers as torch does", () => {
  forEachCase(reference.sparse, 12, (given) => {
    const net = networkOf(given);
    const work = createWorkspace(net, given.rows);
    const found = forwardRows(compressNetwork(net), floats(given.inputs), given.rows, work);
    assertClose([...found], given.logits, "logits");
  });
});

test("products by rows write every row of an odd number, and none beyond", () => {
  const matrix = compressRows(floats([0, 2, 0, 3, 0, 0]), 3, 2);
  assert.deepEqual([...matrix.starts], [0, 1, 2, 2]);
  const out = new Float32Array(12).fill(9);
  multiplyRows(floats([1, 10, 2, 20, 3, 30]), matrix, floats([0, 0, 5]), 3, 3, 2, out);
  assert.deepEqual([...out], [20, 30, 5, 40, 60, 5, 60, 90, 5, 9, 9, 9]);
});

test("without idle units a network is as small as shrink's, and answers the same", () => {
  forEachCase(reference.sparse, 12, (given) => {
    const net = networkOf(given);
    const small = withoutIdleUnits(net);
    assert.deepEqual(small.sizes, given.small);
    assertClose(logitsOf(forward, small, given), given.logits, "logits");
    assert.deepEqual([...flatten(net)], given.parameters); // is as it was
  });
});

test("a layer without any use keeps one unit, and the constant that it puts out", () => {
  const net = createNetwork([1, 2, 1], "relu", floats([0, 0, 1, 2, 3, 4, 5]));
  const small = withoutIdleUnits(net);
  assert.deepEqual(small.sizes, [1, 1, 1]);
  assert.equal(logitsOf(forward, small, { inputs: [7], rows: 1 })[0], 16);
});

test("units that go are those of prune by channels", () => {
  forEachCase(reference.units, 20, ({ sizes, weights, sparsity, masks }) => {
    const scores = magnitudeScores(weights.map(floats));
    assert.deepEqual(listsOf(unitMasks(scores, sizes, sparsity)), masks);
  });
});
