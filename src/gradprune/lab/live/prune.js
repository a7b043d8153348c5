// Chapter 4: take weights away from a network that reads digits, and see what it forgets.
import { createChart } from "./chart.js";
import { button, choice, slider } from "./controls.js";
import { readFloats, readNetwork, readSplit } from "./examples.js";
import { assign, copyNetwork } from "./network.js";
import { createPicture } from "./pixels.js";
import { applyMasks, largestScores, magnitudeScores, pruneMasks, thresholdOf } from "./rank.js";
import { countAll, countKept, createReader, percent, whole } from "./reading.js";
import { closing, createStage, drawer, listen, publish, say, settingsOf } from "./stage.js";
import { createTraces } from "./trace.js";

const RANKINGS = [
  ["smallest", "smallest first"],
  ["random", "random"],
  ["largest", "largest first"],
];
const SCOPES = [
  ["global", "all layers together"],
  ["layer", "each layer by itself"],
];
const SETTINGS = ["sparsity", "ranking", "scope"];
const COLOUR = { smallest: "gp-pruned", random: "gp-random", largest: "gp-largest" };
const LEGEND = RANKINGS.map(([ranking, words]) => [words, COLOUR[ranking]]);
const STAYS = [
  ["stay", "gp-dense"],
  ["go", "gp-pruned"],
];
const BINS = 48;
const colourOf = (key) => {
  const [ranking, scope] = key.split(" ");
  return scope === "layer" ? `${COLOUR[ranking]} gp-live-dashed` : COLOUR[ranking];
};

export function render({ model, el }) {
  const dense = readNetwork(model.get("_network"));
  const test = readSplit(model.get("_test"));
  const read = createReader(dense, test);
  const chosen = () => settingsOf(model, SETTINGS);
  const first = chosen();
  const scores = {
    smallest: magnitudeScores(dense.weights),
    random: splitLike(readFloats(model.get("_random")), dense.weights),
    largest: largestScores(dense.weights),
  };
  const net = copyNetwork(dense);
  const total = countAll(dense.weights);
  const strongest = Math.max(...scores.smallest.map((layer) => Math.max(...layer)));

  // What the network is at a setting: its masks, and how it reads each digit.
  function look({ sparsity, ranking, scope }) {
    const masks = pruneMasks(scores[ranking], sparsity, scope);
    assign(net, dense);
    applyMasks(net.weights, masks);
    return { masks, kept: countKept(masks), ...read(net) };
  }

  const stage = createStage(el, "prune", "Prune a network that reads digits");
  const controls = createControls(first, (change) => publish(model, change));
  const reset = button("Reset", () => {
    traces.clear();
    publish(model, first);
    ask();
  });
  stage.controls.append(...controls.roots, reset);
  const panels = createPanels(dense.sizes, strongest);
  stage.panels.append(...Object.values(panels).map(({ root }) => root));
  const bins = binsOf(dense.weights, strongest, BINS);
  const traces = createTraces(4);

  const request = drawer(stage, () => {
    const setting = chosen();
    const seen = look(setting);
    const name = COLOUR[setting.ranking];
    const at = 100 * setting.sparsity;
    traces.add(`${setting.ranking} ${setting.scope}`, at, seen.accuracy);
    const here = { kind: "points", x: [at], y: [seen.accuracy], class: name };
    panels.curve.draw([...traces.marks(colourOf), here]);
    const rules = thresholds(scores.smallest, seen.masks, setting);
    panels.histogram.draw([...bins.marks(seen.masks), ...rules], { y: { to: bins.highest } });
    const x = seen.byClass.map((_, digit) => digit);
    panels.digits.draw([{ kind: "bars", x, y: seen.byClass, width: 0.7, class: name }]);
    panels.picture.draw(dense.weights[0], seen.masks[0], 0.6 * strongest);
    const { accuracy, kept } = seen;
    const facts = { ...setting, accuracy, kept, removed: total - kept };
    say(stage, facts, sentence(setting, seen, total));
    publish(model, { accuracy });
  });

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
    label: "weights removed",
    ...{ min: 0, max: 99.5, step: 0.1, value: 100 * first.sparsity },
    format: (value) => `${value.toFixed(1)} %`,
    change: (value) => change({ sparsity: Number((value / 100).toFixed(4)) }),
  });
  const ranking = choice({
    label: "Which go?",
    options: RANKINGS,
    value: first.ranking,
    change: (is) => change({ ranking: is }),
  });
  const scope = choice({
    label: "Ranked over",
    options: SCOPES,
    value: first.scope,
    change: (is) => change({ scope: is }),
  });
  const set = (setting) => {
    sparsity.set(100 * setting.sparsity);
    ranking.set(setting.ranking);
    scope.set(setting.scope);
  };
  return { roots: [sparsity.root, ranking.root, scope.root], set };
}

function createPanels(sizes, strongest) {
  const classes = sizes.at(-1);
  const ticks = Array.from({ length: classes }, (_, digit) => digit);
  const share = { label: "share read correctly", from: 0, to: 1 };
  return {
    curve: createChart({
      title: "Test digits read correctly",
      legend: LEGEND,
      x: { label: "weights removed, %", from: 0, to: 100 },
      y: share,
    }),
    histogram: createChart({
      title: "The weights, and the threshold (dashed)",
      legend: STAYS,
      x: { label: "weight", from: -strongest, to: strongest },
      y: { label: "weights", from: 0, to: 1 },
    }),
    picture: createPicture(
      `The first layer: what each of ${sizes[1]} hidden units looks for`,
      sizes[1],
    ),
    digits: createChart({
      title: "Digit by digit: which is lost first?",
      x: { label: "digit", from: -0.6, to: classes - 0.4, ticks },
      y: share,
    }),
  };
}

function sentence({ sparsity }, { kept, accuracy, byClass }, total) {
  const worst = byClass.indexOf(Math.min(...byClass));
  const best = byClass.indexOf(Math.max(...byClass));
  const least = `It reads digit ${worst} worst (${percent(byClass[worst])}) and digit ${best} best (${percent(byClass[best])}).`;
  const gone =
    sparsity === 0
      ? `All ${whole(total)} weights are there`
      : `${whole(kept)} of ${whole(total)} weights are left`;
  return `${gone}: ${percent(accuracy)} of the test digits are read correctly. ${least}`;
}

const splitLike = (numbers, arrays) => {
  const starts = arrays.map((_, i) => countAll(arrays.slice(0, i)));
  return arrays.map(({ length }, i) => numbers.subarray(starts[i], starts[i] + length));
};

// Two rules, at the largest magnitude that goes, or, where the largest go, at the largest that stays; chance has none. For
// each layer where each is ranked by itself.
function thresholds(magnitudes, masks, { ranking, scope }) {
  if (ranking === "random" || countKept(masks) === countAll(masks)) return [];
  const flipped =
    ranking === "largest" ? masks.map((mask) => mask.map((stays) => 1 - stays)) : masks;
  const found =
    scope === "layer"
      ? magnitudes.map((layer, l) => thresholdOf([layer], [flipped[l]]))
      : [thresholdOf(magnitudes, flipped)];
  return found.flatMap((at) => [-at, at].map((x) => ({ kind: "rule", x })));
}

// The histogram: for masks, bars of all weights and, before them, of those that stay.
function binsOf(weights, strongest, count) {
  const width = (2 * strongest) / count;
  const bin = (weight) => Math.min(count - 1, Math.floor((weight + strongest) / width));
  const centres = Array.from({ length: count }, (_, i) => (i + 0.5) * width - strongest);
  const bars = { kind: "bars", x: centres, width };
  const all = new Array(count).fill(0);
  for (const layer of weights) for (const weight of layer) all[bin(weight)] += 1;
  const marks = (masks) => {
    const stay = new Array(count).fill(0);
    weights.forEach((layer, l) => {
      layer.forEach((weight, i) => {
        if (masks[l][i]) stay[bin(weight)] += 1;
      });
    });
    return [
      { ...bars, y: all, class: "gp-pruned" },
      { ...bars, y: stay, class: "gp-dense" },
    ];
  };
  return { highest: 1.05 * Math.max(...all), marks };
}
