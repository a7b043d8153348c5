// Chapter 4: take weights away from a network that reads digits, and see what it forgets.
import { createChart } from "./chart.js";
import { button, choice, slider } from "./controls.js";
import { readFloats, readNetwork, readSplit } from "./examples.js";
import { copyNetwork, createWorkspace, forward, predictions } from "./network.js";
import { createPixels } from "./pixels.js";
import { applyMasks, largestScores, magnitudeScores, pruneMasks } from "./rank.js";
import { percent, whole } from "./reading.js";
import { closing, createStage, drawer, element, listen, publish, say } from "./stage.js";
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
const COLOUR = { smallest: "gp-pruned", random: "gp-random", largest: "gp-largest" };
const LEGEND = RANKINGS.map(([ranking, words]) => [words, COLOUR[ranking]]);
const STAYS = [
  ["stay", "gp-dense"],
  ["go", "gp-pruned"],
];
const colourOf = (key) => {
  const [ranking, scope] = key.split(" ");
  return scope === "layer" ? `${COLOUR[ranking]} gp-live-dashed` : COLOUR[ranking];
};

export function render({ model, el }) {
  const dense = readNetwork(model.get("_network"));
  const test = readSplit(model.get("_test"));
  const random = readFloats(model.get("_random"));
  const classes = dense.sizes.at(-1);
  const first = { sparsity: 0, ranking: "smallest", scope: "global" };
  const chosen = () => ({
    sparsity: model.get("sparsity"),
    ranking: model.get("ranking"),
    scope: model.get("scope"),
  });

  const scores = {
    smallest: magnitudeScores(dense.weights),
    random: splitLike(random, dense.weights),
    largest: largestScores(dense.weights),
  };
  const net = copyNetwork(dense);
  const work = createWorkspace(net, test.rows);
  const total = dense.weights.reduce((sum, weights) => sum + weights.length, 0);
  const strongest = Math.max(
    ...dense.weights.map((weights) => weights.reduce((a, w) => Math.max(a, Math.abs(w)), 0)),
  );
  const digitTotals = countLabels(test.labels, classes);

  // What the network is at a setting: its masks, and how it reads each digit.
  function look({ sparsity, ranking, scope }) {
    const masks = pruneMasks(scores[ranking], sparsity, scope);
    dense.weights.forEach((weights, layer) => {
      net.weights[layer].set(weights);
    });
    applyMasks(net.weights, masks);
    const answers = predictions(forward(net, test.inputs, test.rows, work), classes);
    const right = new Array(classes).fill(0);
    answers.forEach((answer, row) => {
      if (answer === test.labels[row]) right[test.labels[row]] += 1;
    });
    const accuracy = right.reduce((a, b) => a + b) / test.rows;
    const kept = masks.reduce((sum, mask) => sum + mask.reduce((a, b) => a + b, 0), 0);
    return {
      masks,
      accuracy,
      kept,
      byDigit: right.map((count, digit) => count / digitTotals[digit]),
    };
  }

  const stage = createStage(el, "prune", "Prune a network that reads digits");
  const sparsity = slider({
    label: "weights removed",
    min: 0,
    max: 99.5,
    step: 0.1,
    value: 0,
    format: (value) => `${value.toFixed(1)} %`,
    change: (value) => choose({ sparsity: Number((value / 100).toFixed(4)) }),
  });
  const ranking = choice({
    label: "Which go?",
    options: RANKINGS,
    value: "smallest",
    change: (is) => choose({ ranking: is }),
  });
  const scope = choice({
    label: "Ranked over",
    options: SCOPES,
    value: "global",
    change: (is) => choose({ scope: is }),
  });
  const reset = button("Reset", () => {
    traces.clear();
    choose(first);
  });
  stage.controls.append(sparsity.root, ranking.root, scope.root, reset);

  const curve = createChart({
    title: "Test digits read correctly",
    legend: LEGEND,
    x: { label: "weights removed, %", from: 0, to: 100 },
    y: { label: "share read correctly", from: 0, to: 1 },
  });
  const histogram = createChart({
    title: "The weights: what stays and what goes",
    legend: STAYS,
    x: { label: "weight", from: -strongest, to: strongest },
    y: { label: "weights", from: 0, to: 1 },
  });
  const digits = createChart({
    title: "Digit by digit: which is lost first?",
    x: {
      label: "digit",
      from: -0.6,
      to: classes - 0.4,
      ticks: Array.from({ length: classes }, (_, i) => i),
    },
    y: { label: "share read correctly", from: 0, to: 1 },
  });
  const pixels = createPixels({
    label: "The first layer's weights: each hidden unit as a picture of the 64 pixels it reads",
    units: dense.sizes[1],
    columns: 8,
    tile: [8, 8],
  });
  const caption = element(
    "figcaption",
    {},
    "The first layer: what each of 48 hidden units looks for",
  );
  const picture = element("figure", { class: "gp-live-chart" }, caption, pixels.root);
  stage.panels.append(curve.root, histogram.root, picture, digits.root);

  const bins = binsOf(dense.weights, strongest, 48);
  const traces = createTraces(4);

  const request = drawer(stage, () => {
    const setting = chosen();
    const seen = look(setting);
    traces.add(`${setting.ranking} ${setting.scope}`, 100 * setting.sparsity, seen.accuracy);
    curve.draw([
      ...traces.marks(colourOf),
      {
        kind: "points",
        x: [100 * setting.sparsity],
        y: [seen.accuracy],
        class: COLOUR[setting.ranking],
      },
    ]);
    const { before, after, highest } = bins.count(seen.masks);
    const bars = { kind: "bars", x: bins.centres, width: bins.width };
    const marks = [
      { ...bars, y: before, class: "gp-pruned gp-faint" },
      { ...bars, y: after, class: "gp-dense" },
    ];
    histogram.draw(marks, { y: { to: highest } });
    digits.draw([
      {
        kind: "bars",
        x: seen.byDigit.map((_, i) => i),
        y: seen.byDigit,
        width: 0.7,
        class: COLOUR[setting.ranking],
      },
    ]);
    pixels.draw(dense.weights[0], seen.masks[0], 0.6 * strongest);
    const facts = {
      ...setting,
      accuracy: seen.accuracy,
      kept: seen.kept,
      removed: total - seen.kept,
    };
    say(stage, facts, sentence(setting, seen, total));
    publish(model, { accuracy: seen.accuracy });
  });

  function choose(change) {
    publish(model, change);
  }
  function follow() {
    const setting = chosen();
    sparsity.set(100 * setting.sparsity);
    ranking.set(setting.ranking);
    scope.set(setting.scope);
    request();
  }
  listen(stage, model, Object.keys(first), follow);
  follow();
  return closing(stage);
}

function sentence({ sparsity }, { kept, accuracy, byDigit }, total) {
  const worst = byDigit.indexOf(Math.min(...byDigit));
  const best = byDigit.indexOf(Math.max(...byDigit));
  const least = `It reads digit ${worst} worst (${percent(byDigit[worst])}) and digit ${best} best (${percent(byDigit[best])}).`;
  const gone =
    sparsity === 0
      ? `All ${whole(total)} weights are there`
      : `${whole(kept)} of ${whole(total)} weights are left`;
  return `${gone}: ${percent(accuracy)} of the test digits are read correctly. ${least}`;
}

const splitLike = (numbers, arrays) => {
  const starts = arrays.map((_, i) =>
    arrays.slice(0, i).reduce((sum, { length }) => sum + length, 0),
  );
  return arrays.map(({ length }, i) => numbers.subarray(starts[i], starts[i] + length));
};

function countLabels(labels, classes) {
  const counts = new Array(classes).fill(0);
  for (const label of labels) counts[label] += 1;
  return counts;
}

// The histogram: `count(masks)` gives for each bin all weights, those that stay, and the highest bin.
function binsOf(weights, strongest, count) {
  const width = (2 * strongest) / count;
  const bin = (weight) => Math.min(count - 1, Math.floor((weight + strongest) / width));
  const centres = Array.from({ length: count }, (_, i) => (i + 0.5) * width - strongest);
  const before = new Array(count).fill(0);
  for (const layer of weights) for (const weight of layer) before[bin(weight)] += 1;
  const highest = 1.05 * Math.max(...before);
  return {
    centres,
    width,
    count(masks) {
      const after = new Array(count).fill(0);
      weights.forEach((layer, l) => {
        layer.forEach((weight, i) => {
          if (masks[l][i]) after[bin(weight)] += 1;
        });
      });
      return { before, after, highest };
    },
  };
}
