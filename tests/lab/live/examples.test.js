import assert from "node:assert/strict";
import { test } from "node:test";
import { readHalves } from "../../../src/gradprune/lab/live/examples.js";
import { forEachCase, reference } from "./reference.js";

// As anywidget hands bytes over: at any offset.
function viewOf(bytes, offset) {
  const buffer = new ArrayBuffer(bytes.length + offset);
  new Uint8Array(buffer, offset).set(bytes);
  return new DataView(buffer, offset);
}

test("numbers of half precision are read exactly: normal ones, the smallest, and zeros", () => {
  forEachCase(reference.halves, 2, ({ bytes, numbers }) => {
    for (const offset of [0, 1, 3]) {
      assert.deepEqual([...readHalves(viewOf(bytes, offset))], numbers);
    }
  });
});

test("what is infinite or no number is refused", () => {
  for (const high of [0x7c, 0xfc, 0x7e]) {
    assert.throws(() => readHalves(viewOf([0, high], 0)), /infinite or NaN/);
  }
});
