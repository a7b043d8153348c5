// Chapter 8: take weights or units away, and measure in this browser what that saves: masked, by rows, as fewer units.
import { createChart } from "./chart.js";
import { button, choice, slider } from "./controls.js";
import { readNetwork, readSplit } from "./examples.js";
import { copyNetwork, createWorkspace, forward } from "./network.js";
import { applyMasks, magnitudeScores, pruneMasks } from "./rank.js";
import { countAll, createJudge, percent } from "./reading.js";
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
import { createTimes, ratesAt, shareOf, takeTime } from "./timing.js";

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
const HIGHEST = 1.6; // share of the dense time at which the chart ends
const BYTES_EACH = 4;

export function render({ model, el }) {
  const dense = readNetwork(model.get("_network"));
  const test = readSplit(model.get("_test"));
  const scores = magnitudeScores(dense.weights);
  const work = createWorkspace(dense, test.rows);
  const judge = createJudge(test.labels, dense.sizes.at(-1));
  const chosen = () => settingsOf(model, SETTINGS);
  const first = chosen();
  const whole = denseCost(dense);
  const runDense = () => forward(dense, test.inputs, test.rows, work);
  const measured = new Map(); // the times of a grain
  let running = null; // the grain that is being measured

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
  const promised = new Map(); // the ways of a grain at each level
  function promise(grain) {
    if (!promised.has(grain)) {
      const at = (level) => [level, look({ sparsity: level, grain }).ways];
      promised.set(grain, new Map(LEVELS.map(at)));
    }
    return promised.get(grain);
  }

  const stage = createStage(el, "speed", "Measure what zeros save in your browser");
  const controls = createControls(first, (change) => publish(model, change));
  const measure = button("Measure here", () => startMeasuring());
  const reset = button("Reset", () => {
    walk.stop();
    measured.clear();
    publish(model, first);
    ask();
  });
  stage.controls.append(...controls.roots, measure, reset);
  const charts = createCharts();
  stage.panels.append(...Object.values(charts).map(({ root }) => root));

  const draw = () => {
    const setting = chosen();
    const { sizes, ways } = look(setting);
    const found = measured.get(setting.grain) ?? null;
    drawCounts(charts, setting, { ways, levels: promise(setting.grain), whole });
    drawTimes(charts, setting, found, test.rows);
    const read = (way) => judge(ways[way].run()).accuracy;
    const facts = {
      ...{ ...setting, ...costFacts(ways) },
      kept: ways.rows.flops / 2, // a product and a sum for each weight that stays
      units: sizes[1],
      accuracy: read("masked"),
      accuracyRows: read("rows"),
      accuracyShrunk: read("shrunk"),
      measured: found?.done ?? 0,
    };
    say(stage, facts, sentence(facts, whole, found, setting, test.rows));
    publish(model, { accuracy: facts.accuracy });
  };
  const request = drawer(stage, draw);

  // One step times one way at one sparsity; all ways and sparsities in turn, round after round.
  const walk = animator(stage, {
    step() {
      const runOf = (way, level) =>
        way === "dense" ? runDense : promise(running).get(level)[way].run;
      return takeTime(measured.get(running), runOf);
    },
    draw() {
      if (measured.get(running).at % WAYS.length === 0) draw();
    },
    done: () => request(),
  });
  function startMeasuring() {
    if (walk.isRunning()) return;
    running = model.get("grain");
    const names = WAYS.map(([way]) => way);
    measured.set(running, createTimes(LEVELS, names, ROUNDS));
    for (const way of Object.values(promise(running).get(0))) way.run(); // compiled before it is timed
    walk.start();
  }

  function follow() {
    controls.set(chosen());
    request();
  }
  const ask = listen(stage, model, SETTINGS, follow);
  follow();
  return closing(stage);
}

function createControls(first, change) {
  const sparsity = slider({
    label: "removed",
    ...{ min: 0, max: 99, step: 1, value: 100 * first.sparsity },
    format: (value) => `${value} %`,
    change: (value) => change({ sparsity: Number((value / 100).toFixed(4)) }),
  });
  const grain = choice({
    label: "What goes?",
    options: GRAINS,
    value: first.grain,
    change: (is) => change({ grain: is }),
  });
  const set = (setting) => {
    sparsity.set(Math.round(100 * setting.sparsity));
    grain.set(setting.grain);
  };
  return { roots: [sparsity.root, grain.root], set };
}

function createCharts() {
  const legend = WAYS.map(([, words, colour]) => [words, colour]);
  const across = { label: "removed, %", from: 0, to: 100 };
  const named = (names) => ({
    ...{ from: 0.4, to: names.length + 0.6, ticks: names.map((_, i) => i + 1) },
    format: (i) => names[i - 1],
  });
  return {
    times: createChart({
      title: "Time of a prediction, measured here (dense is 1)",
      legend,
      x: across,
      y: { label: "share of the dense time", from: 0, to: HIGHEST },
    }),
    counted: createChart({
      title: "FLOPs: what the counting promises",
      legend,
      x: across,
      y: { label: "share of the dense FLOPs", from: 0, to: HIGHEST },
    }),
    bytes: createChart({
      title: "Bytes in memory",
      x: named(["masked", "rows", "shrunk"]),
      y: { label: "share of the dense bytes", from: 0, to: 2.1 },
    }),
    seconds: createChart({
      title: "Predictions a second, measured here",
      x: named(["dense", "masked", "rows", "shrunk"]),
      y: { label: "thousands", from: 0, to: 1 },
    }),
  };
}

const hereRule = ({ sparsity }) => ({ kind: "rule", x: 100 * sparsity, class: "gp-random" });
const bars = (y) => ({ kind: "bars", width: 0.6, class: "gp-dense", x: y.map((_, i) => i + 1), y });

function drawCounts({ counted, bytes }, setting, { ways, levels, whole }) {
  const x = LEVELS.map((level) => 100 * level);
  const lines = WAYS.map(([way, , colour]) => {
    const y = LEVELS.map((level) => levels.get(level)[way].flops / whole.flops);
    return { kind: "line", x, y, class: colour };
  });
  counted.draw([...lines, hereRule(setting)]);
  bytes.draw([bars(WAYS.map(([way]) => ways[way].bytes / whole.bytes))]);
}

function drawTimes({ times, seconds }, setting, found, rows) {
  const marks = found ? WAYS.flatMap(([way, , colour]) => timeMarks(found, way, colour)) : [];
  times.draw([{ kind: "rule", y: 1, text: "dense" }, ...marks, hereRule(setting)]);
  const rates = found ? ratesOf(found, setting.sparsity, rows) : [0, 0, 0, 0];
  seconds.draw([bars(rates)], { y: { to: 1.1 * Math.max(...rates) || 1 } });
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
const ratesOf = (found, sparsity, rows) =>
  ratesAt(
    found,
    WAYS.map(([way]) => way),
    nearest(sparsity),
    rows,
  );

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
  const rate = Math.round(ratesOf(found, sparsity, rows)[0]);
  return `${what}; ${counts}. Measured in your browser at ${percent(level)}: of the dense time masked ${masked}, by rows ${byRows}, shrunk ${shrunk}; dense it makes ${rate} thousand predictions a second.`;
}
