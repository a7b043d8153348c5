// Chapter 6: say what a network may cost, and see bisection find how many of its weights can go.
import { createChart } from "./chart.js";
import { button, choice, slider } from "./controls.js";
import { readNetwork, readSplit } from "./examples.js";
import { assign, copyNetwork } from "./network.js";
import { applyMasks, magnitudeScores, pruneMasks } from "./rank.js";
import { countAll, countKept, createReader, percent, whole } from "./reading.js";
import { closing, createStage, drawer, listen, publish, say, settingsOf } from "./stage.js";

const BOUNDED = [
  ["accuracy", "accuracy lost"],
  ["flops", "FLOPs"],
  ["bytes", "bytes"],
];
const SHARED = [
  ["global", "all layers ranked together"],
  ["layer", "each layer the same share"],
];
const SETTINGS = ["bounded", "limit", "looks", "scope"];
const BYTES_EACH = 4;

export function render({ model, el }) {
  const dense = readNetwork(model.get("_network"));
  const validation = readSplit(model.get("_validation"));
  const test = readSplit(model.get("_test"));
  const readValidation = createReader(dense, validation);
  const readTest = createReader(dense, test);
  const scores = magnitudeScores(dense.weights);
  const net = copyNetwork(dense);
  const total = countAll(dense.weights);
  const chosen = () => settingsOf(model, SETTINGS);
  const first = chosen();
  const seen = new Map();

  // What a sparsity costs: the shares of validation digits, of the FLOPs and of the bytes. Each is looked at once.
  function look(sparsity, scope) {
    const key = `${scope} ${sparsity}`;
    if (!seen.has(key)) {
      const masks = pruneTo(sparsity, scope);
      const kept = countKept(masks);
      const bytes = packedBytes(dense, kept) / (BYTES_EACH * numbersOf(dense));
      const accuracy = readValidation(net).accuracy;
      seen.set(key, { sparsity, masks, kept, accuracy, flops: kept / total, bytes });
    }
    return seen.get(key);
  }
  function pruneTo(sparsity, scope) {
    const masks = pruneMasks(scores, sparsity, scope);
    assign(net, dense);
    applyMasks(net.weights, masks);
    return masks;
  }

  const stage = createStage(el, "budget", "Say what a network may cost");
  const limit = slider({
    label: "what may it cost?",
    ...{ min: 0, max: 100, step: 0.5, value: 100 * first.limit },
    format: (value) => allowed(chosen().bounded, value / 100),
    change: (value) => publish(model, { limit: Number((value / 100).toFixed(4)) }),
  });
  const looks = slider({
    label: "looks of the bisection",
    ...{ min: 0, max: 10, step: 1, value: first.looks },
    change: (value) => publish(model, { looks: value }),
  });
  const bounded = choice({
    label: "In",
    options: BOUNDED,
    value: first.bounded,
    change: (is) => publish(model, { bounded: is }),
  });
  const scope = choice({
    label: "Where?",
    options: SHARED,
    value: first.scope,
    change: (is) => publish(model, { scope: is }),
  });
  const reset = button("Reset", () => {
    publish(model, first);
    ask();
  });
  stage.controls.append(bounded.root, limit.root, looks.root, scope.root, reset);

  const passing = [
    ["passes", "gp-dense"],
    ["does not", "gp-pruned"],
  ];
  const curve = createChart({
    title: "What was looked at",
    legend: passing,
    x: { label: "weights removed, %", from: 0, to: 100 },
    y: { label: "share", from: 0, to: 1 },
  });
  const interval = createChart({
    title: "Between which the answer lies",
    legend: passing,
    x: { label: "look", from: 0, to: 10, ticks: [0, 2, 4, 6, 8, 10] },
    y: { label: "weights removed, %", from: 0, to: 100 },
  });
  const layers = createChart({
    title: "Where: the share that stays of each layer",
    x: {
      label: "layer",
      ...{ from: 0.4, to: dense.weights.length + 0.6 },
      ticks: dense.weights.map((_, layer) => layer + 1),
    },
    y: { label: "share that stays", from: 0, to: 1 },
  });
  const costs = createChart({
    title: "What is left",
    x: { from: 0.4, to: 3.6, ticks: [1, 2, 3], format: (i) => ["digits", "FLOPs", "bytes"][i - 1] },
    y: { label: "share", from: 0, to: 1 },
  });
  stage.panels.append(curve.root, interval.root, layers.root, costs.root);

  const request = drawer(stage, () => {
    const setting = chosen();
    const whole = look(0, setting.scope);
    const test0 = (sparsity) => {
      pruneTo(sparsity, setting.scope);
      return readTest(net).accuracy;
    };
    const path = bisect(setting, whole.accuracy, (sparsity) => look(sparsity, setting.scope));
    const found = look(path.answer, setting.scope);
    const of = setting.bounded;
    const wanted = of === "accuracy" ? whole.accuracy - setting.limit : setting.limit;
    curve.draw([
      { kind: "rule", y: Math.max(wanted, 0), text: of === "accuracy" ? "at least" : "at most" },
      { kind: "rule", x: 100 * path.answer, class: "gp-corrected" },
      ...dots(path.seen, (one) => [100 * one.sparsity, one[of]]),
    ]);
    const at = path.ends.map((_, i) => i);
    interval.draw([
      { kind: "line", x: at, y: path.ends.map(([low]) => 100 * low), class: "gp-random" },
      { kind: "line", x: at, y: path.ends.map(([, high]) => 100 * high), class: "gp-random" },
      ...dots(path.seen, (one, i) => [i + 1, 100 * one.sparsity]),
    ]);
    const stays = found.masks.map((mask) => countKept([mask]) / mask.length);
    const bars = { kind: "bars", width: 0.6, class: "gp-dense" };
    layers.draw([{ ...bars, x: stays.map((_, layer) => layer + 1), y: stays }]);
    costs.draw([{ ...bars, x: [1, 2, 3], y: [found.accuracy, found.flops, found.bytes] }]);
    const facts = {
      ...setting,
      ...{ sparsity: found.sparsity, kept: found.kept, validation: found.accuracy },
      ...{ flops: found.flops, bytes: found.bytes, test: test0(found.sparsity) },
      ...{ low: path.ends.at(-1)[0], high: path.ends.at(-1)[1], met: path.met },
    };
    say(stage, facts, sentence(facts, whole.accuracy, total));
    publish(model, { accuracy: facts.test });
  });

  function follow() {
    const setting = chosen();
    bounded.set(setting.bounded);
    limit.set(100 * setting.limit);
    looks.set(setting.looks);
    scope.set(setting.scope);
    request();
  }
  const ask = listen(stage, model, SETTINGS, follow);
  follow();
  return closing(stage);
}

// Halves the interval so many times. Of accuracy the largest sparsity that passes is wanted, and the dense network
// does; of a cost the smallest, and the empty network passes, where any does. Twin: gp.largest_sparsity.
function bisect({ bounded, limit, looks }, dense, look) {
  const ofAccuracy = bounded === "accuracy";
  const passes = (one) => (ofAccuracy ? one.accuracy - dense >= -limit : one[bounded] <= limit);
  let [low, high] = [0, 1];
  const ends = [[low, high]];
  const seen = [];
  for (let i = 0; i < looks; i++) {
    const middle = (low + high) / 2;
    const passed = passes(look(middle));
    seen.push({ ...look(middle), passed });
    if (passed === ofAccuracy) low = middle;
    else high = middle;
    ends.push([low, high]);
  }
  const answer = ofAccuracy ? low : high;
  return { ends, seen, answer, met: ofAccuracy || passes(look(answer)) };
}

function dots(seen, place) {
  return [true, false].map((wanted) => {
    const places = seen.map(place).filter((_, i) => seen[i].passed === wanted);
    const [x, y] = [places.map(([across]) => across), places.map(([, up]) => up)];
    return { kind: "points", x, y, class: wanted ? "gp-dense" : "gp-pruned" };
  });
}

const allowed = (bounded, share) =>
  bounded === "accuracy" ? `${percent(share)} of the digits` : `${percent(share)} of the dense`;

const numbersOf = ({ weights, biases }) => countAll(weights) + countAll(biases);

// One bit a weight and the nonzeros. Twin: gradprune.core.encoded.bitmask_bytes.
const packedBytes = ({ weights, biases }, kept) =>
  weights.reduce((sum, { length }) => sum + Math.ceil(length / 8), 0) +
  BYTES_EACH * (kept + countAll(biases));

function sentence(facts, dense, total) {
  const { bounded, limit, looks, sparsity, kept, validation, flops, bytes, test, low, high } =
    facts;
  const what =
    bounded === "accuracy"
      ? `It may lose ${percent(limit)} of the validation digits (dense ${percent(dense)})`
      : `It may cost ${percent(limit)} of the dense network's ${bounded === "flops" ? "FLOPs" : "bytes"}`;
  if (!facts.met) return `${what}: no sparsity meets that; an empty one costs ${percent(bytes)}.`;
  const after = `after ${looks} looks the answer lies between ${percent(low)} and ${percent(high)} removed`;
  const left = `With ${percent(sparsity)} removed, ${whole(kept)} of ${whole(total)} weights stay, ${percent(flops)} of the FLOPs and ${percent(bytes)} of the bytes`;
  return `${what}: ${after}. ${left}; it reads ${percent(validation)} of the validation digits and ${percent(test)} of the test digits.`;
}
