import assert from "node:assert/strict";
import { test } from "node:test";
import { createTraces } from "../../../src/gradprune/lab/live/trace.js";

const colours = { a: "gp-pruned", b: "gp-random" };
const marksOf = (traces) => traces.marks((key) => colours[key]);

test("what was seen nearby is joined in order, what lies further apart is not", () => {
  const traces = createTraces(4);
  for (const at of [10, 0, 4, 15, 14]) traces.add("a", at, at / 100);
  const [line, points] = marksOf(traces);
  assert.deepEqual(line, {
    kind: "line",
    x: [0, 4, 10, 10, 14, 15],
    y: [0, 0.04, Number.NaN, 0.1, 0.14, 0.15],
    class: "gp-pruned",
  });
  assert.deepEqual(points.x, [0, 4, 10, 14, 15]);
  assert.deepEqual(points.y, [0, 0.04, 0.1, 0.14, 0.15]);
});

test("each key has a trace of its own, the later value of a place holds, and clear forgets all", () => {
  const traces = createTraces(1);
  traces.add("a", 1, 0.5);
  traces.add("b", 1, 0.25);
  traces.add("a", 1, 0.75);
  const points = marksOf(traces).filter(({ kind }) => kind === "points");
  assert.deepEqual(
    points.map((mark) => [mark.class, mark.x, mark.y]),
    [
      ["gp-pruned", [1], [0.75]],
      ["gp-random", [1], [0.25]],
    ],
  );
  traces.clear();
  assert.deepEqual(marksOf(traces), []);
});
