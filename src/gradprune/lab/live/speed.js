// Chapter 8: take weights or units away, and measure in this browser what that saves: masked, by rows, as fewer units.
import { createChart } from "./chart.js";
import { button, choice, slider } from "./controls.js";
import { readNetwork, readSplit } from "./examples.js";
import { copyNetwork, createWorkspace, forward, predictions } from "./network.js";
import { applyMasks, magnitudeScores, pruneMasks } from "./rank.js";
import { countAll, percent } from "./reading.js";
import { compressNetwork, forwardRows, unitMasks, withoutIdleUnits } from "./sparse.js";
import {
  animator,
  closing,
  createStage,
  drawer,
  listen,
  publish,
  say,
  settingsOf,
} from "./stage.js";

const GRAINS = [
  ["weights", "single weights"],
  ["units", "whole hidden units"],
];
const SETTINGS = ["sparsity", "grain"];
// How a network is run, and its colour.
const WAYS = [
  ["masked", "zeros multiplied", "gp-pruned"],
  ["rows", "by rows, zeros left out", "gp-corrected"],
  ["shrunk", "idle units removed", "gp-dense"],
];
const LEVELS = [0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98];
const ROUNDS = 5;
const LEAST = 10; // milliseconds that are timed at once: the browser's clock is coarse
const HIGHEST = 1.6; // share of the dense time at which the chart ends
const BYTES_EACH = 4;

export function render({ model, el }) {
  const dense = readNetwork(model.get("_network"));
  const test = readSplit(model.get("_test"));
  const scores = magnitudeScores(dense.weights);
  const work = createWorkspace(dense, test.rows);
  const classes = dense.sizes.at(-1);
  const chosen = () => settingsOf(model, SETTINGS);
  const first = chosen();
  const measured = new Map(GRAINS.map(([grain]) => [grain, null]));
  let running = null; // the grain that is being measured, and what is left to do

  // The network at a setting, in the three ways; each is a function of the inputs, and a cost.
  function look({ sparsity, grain }) {
    const masks =
      grain === "weights"
        ? pruneMasks(scores, sparsity, "global")
        : unitMasks(scores, dense.sizes, sparsity);
    const net = copyNetwork(dense);
    applyMasks(net.weights, masks);
    const [sparse, small] = [compressNetwork(net), withoutIdleUnits(net)];
    const room = createWorkspace(small, test.rows);
    return {
      sizes: small.sizes,
      ways: {
        masked: { run: () => forward(net, test.inputs, test.rows, work), ...denseCost(net) },
        rows: { run: () => forwardRows(sparse, test.inputs, test.rows, work), ...rowsCost(sparse) },
        shrunk: { run: () => forward(small, test.inputs, test.rows, room), ...denseCost(small) },
      },
    };
  }
  const whole = denseCost(dense);
  const runDense = () => forward(dense, test.inputs, test.rows, work);
  const read = (logits) =>
    predictions(logits, classes).reduce(
      (right, answer, row) => right + (answer === test.labels[row] ? 1 : 0),
      0,
    ) / test.rows;

  const stage = createStage(el, "speed", "Measure what zeros save in your browser");
  const sparsity = slider({
    label: "removed",
    ...{ min: 0, max: 99, step: 1, value: 100 * first.sparsity },
    format: (value) => `${value} %`,
    change: (value) => publish(model, { sparsity: Number((value / 100).toFixed(4)) }),
  });
  const grain = choice({
    label: "What goes?",
    options: GRAINS,
    value: first.grain,
    change: (is) => publish(model, { grain: is }),
  });
  const measure = button("Measure here", () => startMeasuring());
  const reset = button("Reset", () => {
    walk.stop();
    for (const [of] of GRAINS) measured.set(of, null);
    publish(model, first);
    ask();
  });
  stage.controls.append(sparsity.root, grain.root, measure, reset);

  const legend = WAYS.map(([, words, colour]) => [words, colour]);
  const across = { label: "removed, %", from: 0, to: 100 };
  const times = createChart({
    title: "Time of a prediction, measured here (dense is 1)",
    legend,
    x: across,
    y: { label: "share of the dense time", from: 0, to: HIGHEST },
  });
  const counted = createChart({
    title: "FLOPs: what the counting promises",
    legend,
    x: across,
    y: { label: "share of the dense FLOPs", from: 0, to: HIGHEST },
  });
  const bytes = createChart({
    title: "Bytes in memory",
    x: {
      ...{ from: 0.4, to: 3.6, ticks: [1, 2, 3] },
      format: (i) => ["masked", "rows", "shrunk"][i - 1],
    },
    y: { label: "share of the dense bytes", from: 0, to: 2.1 },
  });
  const seconds = createChart({
    title: "Predictions a second, measured here",
    x: {
      ...{ from: 0.4, to: 4.6, ticks: [1, 2, 3, 4] },
      format: (i) => ["dense", "masked", "rows", "shrunk"][i - 1],
    },
    y: { label: "thousands", from: 0, to: 1 },
  });
  stage.panels.append(times.root, counted.root, bytes.root, seconds.root);

  const promised = { weights: new Map(), units: new Map() };
  function promise(of) {
    if (promised[of].size === 0) {
      for (const level of LEVELS)
        promised[of].set(level, look({ sparsity: level, grain: of }).ways);
    }
    return promised[of];
  }

  const draw = () => {
    const setting = chosen();
    const seen = look(setting);
    const here = 100 * setting.sparsity;
    const levels = promise(setting.grain);
    const x = LEVELS.map((level) => 100 * level);
    counted.draw([
      ...WAYS.map(([way, , colour]) => ({
        ...{ kind: "line", x, class: colour },
        y: LEVELS.map((level) => levels.get(level)[way].flops / whole.flops),
      })),
      { kind: "rule", x: here, class: "gp-random" },
    ]);
    bytes.draw([
      {
        ...{ kind: "bars", width: 0.6, class: "gp-dense", x: [1, 2, 3] },
        y: WAYS.map(([way]) => seen.ways[way].bytes / whole.bytes),
      },
    ]);
    const found = measured.get(setting.grain);
    times.draw([
      { kind: "rule", y: 1, text: "dense" },
      ...(found === null ? [] : WAYS.flatMap(([way, , colour]) => timeMarks(found, way, colour))),
      { kind: "rule", x: here, class: "gp-random" },
    ]);
    const rates = found === null ? null : ratesAt(found, setting.sparsity, test.rows);
    const most = 1.1 * Math.max(0, ...(rates ?? [])) || 1;
    const bars = { kind: "bars", width: 0.6, class: "gp-dense", x: [1, 2, 3, 4] };
    seconds.draw([{ ...bars, y: rates ?? [0, 0, 0, 0] }], { y: { to: most } });
    const facts = {
      ...setting,
      ...costFacts(seen.ways),
      kept: seen.ways.rows.flops / 2, // a product and a sum for each weight that stays
      units: seen.sizes[1],
      accuracy: read(seen.ways.masked.run()),
      accuracyRows: read(seen.ways.rows.run()),
      accuracyShrunk: read(seen.ways.shrunk.run()),
      measured: found === null ? 0 : found.done,
    };
    say(stage, facts, sentence(facts, whole, found, setting, test.rows));
    publish(model, { accuracy: facts.accuracy });
  };
  const request = drawer(stage, draw);

  // One step times one way at one sparsity; all ways and sparsities in turn, round after round.
  const walk = animator(stage, {
    step() {
      const found = measured.get(running.grain);
      const [level, way] = running.turns[running.at];
      const run = way === "dense" ? runDense : promise(running.grain).get(level)[way].run;
      found.times.get(`${way} ${level}`).push(millisecondsOf(run));
      running.at += 1;
      found.done = Math.floor(running.at / running.each);
      return running.at < running.turns.length;
    },
    draw() {
      if (running.at % WAYS.length === 0) draw();
    },
    done: () => request(),
  });
  function startMeasuring() {
    const of = model.get("grain");
    if (walk.isRunning()) return;
    const each = LEVELS.flatMap((level) =>
      ["dense", ...WAYS.map(([way]) => way)].map((way) => [level, way]),
    );
    measured.set(of, {
      done: 0,
      times: new Map(each.map(([level, way]) => [`${way} ${level}`, []])),
    });
    for (const way of Object.values(promise(of).get(0))) way.run(); // compiled before it is timed
    running = { grain: of, at: 0, each: each.length, turns: Array(ROUNDS).fill(each).flat() };
    walk.start();
  }

  function follow() {
    const setting = chosen();
    sparsity.set(Math.round(100 * setting.sparsity));
    grain.set(setting.grain);
    request();
  }
  const ask = listen(stage, model, SETTINGS, follow);
  follow();
  return closing(stage);
}

// A multiplication and an addition a weight; four bytes a number.
const denseCost = ({ weights, biases }) => ({
  flops: 2 * countAll(weights),
  bytes: BYTES_EACH * (countAll(weights) + countAll(biases)),
});
// By rows each weight that is left has its value and its place, and each row its start.
const rowsCost = ({ layers, biases }) => ({
  flops: 2 * countAll(layers.map(({ values }) => values)),
  bytes:
    BYTES_EACH *
    (countAll(biases) +
      countAll(layers.flatMap(({ starts, places, values }) => [starts, places, values]))),
});

// Milliseconds of one run, over as many as take long enough for the browser's clock.
function millisecondsOf(run) {
  const began = performance.now();
  let times = 0;
  let took = 0;
  while (took < LEAST) {
    run();
    times += 1;
    took = performance.now() - began;
  }
  return took / times;
}

// The time of a way at a level over the dense one's, the shortest of the rounds of each: what else runs only adds.
function shareOf({ times }, way, level) {
  const [own, dense] = [times.get(`${way} ${level}`), times.get(`dense ${level}`)];
  return own.length === 0 ? Number.NaN : Math.min(...own) / Math.min(...dense);
}

function timeMarks(found, way, colour) {
  const seen = LEVELS.filter((level) => !Number.isNaN(shareOf(found, way, level)));
  if (seen.length === 0) return [];
  const [x, y] = [
    seen.map((level) => 100 * level),
    seen.map((level) => Math.min(shareOf(found, way, level), HIGHEST)),
  ];
  return [
    { kind: "line", x, y, class: colour },
    { kind: "points", x, y, class: colour },
  ];
}

const nearest = (sparsity) =>
  LEVELS.reduce((best, level) =>
    Math.abs(level - sparsity) < Math.abs(best - sparsity) ? level : best,
  );

// Thousands of predictions a second: dense and the three ways, at the measured sparsity nearest to the slider's.
function ratesAt({ times }, sparsity, rows) {
  const level = nearest(sparsity);
  return ["dense", ...WAYS.map(([way]) => way)].map((way) => {
    const found = times.get(`${way} ${level}`);
    return found.length === 0 ? 0 : rows / Math.min(...found);
  });
}

const costFacts = (ways) =>
  Object.fromEntries(
    Object.entries(ways).flatMap(([way, { flops, bytes }]) => [
      [`${way}Flops`, flops],
      [`${way}Bytes`, bytes],
    ]),
  );

function sentence(facts, whole, found, { sparsity, grain }, rows) {
  const of = (part, all) => percent(part / all);
  const what = `Without ${percent(sparsity)} of its ${grain === "weights" ? "weights" : "hidden units"} it reads ${percent(facts.accuracy)} of the test digits`;
  const counts = `counted, the masked network takes all FLOPs, by rows ${of(facts.rowsFlops, whole.flops)} of them, and with idle units removed (${facts.units} stay) ${of(facts.shrunkFlops, whole.flops)}`;
  if (found === null) return `${what}; ${counts}. Press Measure here to see what that is worth.`;
  const level = nearest(sparsity);
  const shares = WAYS.map(([way]) => shareOf(found, way, level));
  if (shares.some(Number.isNaN)) return `${what}; ${counts}. Measuring ...`;
  const [masked, byRows, shrunk] = shares.map((share) => `${share.toFixed(2)}`);
  const rate = Math.round(ratesAt(found, sparsity, rows)[0]);
  return `${what}; ${counts}. Measured in your browser at ${percent(level)}: of the dense time masked ${masked}, by rows ${byRows}, shrunk ${shrunk}; dense it makes ${rate} thousand predictions a second.`;
}
