// Chapter 7: choose a kind of network, take weights away, train what is left, and see which of its matrices keep them.
import { ADAM } from "./adam.js";
import { createChart } from "./chart.js";
import { button, choice, slider } from "./controls.js";
import { readHalves, readSplit } from "./examples.js";
import { layersNamed } from "./kit.js";
import { copyLayered, createLayered, flattenLayered, LAYERED } from "./layered.js";
import { generator } from "./random.js";
import { applyMasks, magnitudeScores, pruneMasks } from "./rank.js";
import { countAll, countKept, createReader, percent, whole } from "./reading.js";
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
import { createTraces } from "./trace.js";
import { createTraining, trainSteps } from "./training.js";

const SETTINGS = ["kind", "sparsity", "ranking", "scope"];
const READ = 10; // training steps between two readings of the test digits, each of which has a frame of its own
const A_FRAME = 2; // training steps a frame
const RANKINGS = [
  ["smallest", "the smallest"],
  ["random", "at random"],
];
const SCOPES = [
  ["global", "all together"],
  ["layer", "each matrix by itself"],
];
const COLOUR = {
  smallest: "gp-pruned",
  random: "gp-random",
  "smallest-trained": "gp-corrected",
  "random-trained": "gp-corrected gp-faint",
};
const colourOf = (key) => {
  const [what, scope] = key.split(" ");
  return scope === "layer" ? `${COLOUR[what]} gp-live-dashed` : COLOUR[what];
};

export function render({ model, el }) {
  const packed = model.get("_networks");
  const test = readSplit(model.get("_test"));
  const train = readSplit(model.get("_train"));
  const chosen = () => settingsOf(model, SETTINGS);
  const first = chosen();

  const known = new Map(); // what is unpacked only when it is asked for
  const kindOf = (name) => {
    if (!known.has(name)) known.set(name, unpack(packed[name], test));
    return known.get(name);
  };

  // The network that is shown, from its pruning on; made anew after each setting, once a frame at most.
  let now = null;
  const shown = () => {
    now ??= prune(chosen());
    return now;
  };
  function prune({ kind, sparsity, ranking, scope }) {
    const of = kindOf(kind);
    const net = copyLayered(of.dense);
    const masks = pruneMasks(of.scores[ranking], sparsity, scope);
    applyMasks(net.weights, masks);
    const pruned = of.read(net).accuracy;
    of.traces.add(`${ranking} ${scope}`, 100 * sparsity, pruned);
    return { of, net, masks, pruned, training: null, seen: [[0, pruned]] };
  }
  const trainingOf = ({ of, net, masks }) =>
    createTraining({
      ...{ net, inputs: train.inputs, labels: train.labels, classes: net.sizes[1], masks },
      ...{ batch: of.batch, seed: 0, passes: LAYERED, method: ADAM, optimizer: { rate: of.rate } },
    });
  const trained = () => shown().seen.at(-1)[0] === shown().of.steps;

  // A few steps at a rate that falls on a straight line to 0; every tenth step is followed by a reading.
  function step() {
    const { of, net, seen } = shown();
    now.training ??= trainingOf(now);
    const { training } = now;
    if (training.steps % READ === 0 && seen.at(-1)[0] !== training.steps) {
      seen.push([training.steps, of.read(net).accuracy]);
    } else {
      for (let i = 0; i < A_FRAME && (i === 0 || training.steps % READ !== 0); i++) {
        training.state.rate = of.rate * (1 - training.steps / of.steps);
        trainSteps(training, 1);
      }
    }
    return !trained();
  }

  const stage = createStage(el, "kinds", "Four kinds of network, pruned and trained again");
  const set = (name) => (is) => publish(model, { [name]: is });
  const kind = choice({
    label: "Network",
    options: Object.keys(packed).map((name) => [name, name]),
    value: first.kind,
    change: set("kind"),
  });
  const sparsity = slider({
    label: "weights removed",
    ...{ min: 0, max: 99, step: 0.5, value: 100 * first.sparsity },
    format: (value) => `${value.toFixed(1)} %`,
    change: (value) => publish(model, { sparsity: Number((value / 100).toFixed(4)) }),
  });
  const ranking = choice({
    label: "Which go?",
    options: RANKINGS,
    value: first.ranking,
    change: set("ranking"),
  });
  const scope = choice({
    label: "Ranked",
    options: SCOPES,
    value: first.scope,
    change: set("scope"),
  });
  const go = button("Train", () => {
    if (walk.isRunning()) walk.stop();
    else walk.start();
    request();
  });
  const reset = button("Reset", () => {
    for (const { traces } of known.values()) traces.clear();
    publish(model, first);
    ask();
  });
  stage.controls.append(kind.root, sparsity.root, ranking.root, scope.root, go, reset);

  const share = { label: "share read correctly", from: 0, to: 1.08 };
  const curve = createChart({
    title: "Test digits read",
    legend: [
      ["smallest gone", "gp-pruned"],
      ["at random", "gp-random"],
      ["trained again (fainter: after random)", "gp-corrected"],
    ],
    x: { label: "weights removed, %", from: 0, to: 100 },
    y: share,
  });
  const course = createChart({
    title: "While it trains, the removed weights held at zero",
    x: { label: "training step", from: 0, to: 1 },
    y: share,
  });
  const matrices = createChart({
    title: "Which share of its weights does each matrix keep?",
    x: { label: "matrix", from: 0, to: 1 },
    y: { label: "share kept", from: 0, to: 1 },
  });
  stage.panels.append(curve.root, course.root, matrices.root);

  const draw = () => {
    const { of, pruned, masks, seen, training } = shown();
    const steps = training?.steps ?? 0;
    const setting = chosen();
    const accuracy = seen.at(-1)[1];
    if (trained())
      of.traces.add(
        `${setting.ranking}-trained ${setting.scope}`,
        100 * setting.sparsity,
        accuracy,
      );
    const dense = { kind: "rule", y: of.accuracy, class: "gp-dense", text: "dense" };
    const at = (x, y, name) => ({ kind: "points", x: [x], y: [y], class: name });
    const here = at(100 * setting.sparsity, pruned, COLOUR[setting.ranking]);
    const after = at(100 * setting.sparsity, accuracy, "gp-corrected");
    const dots = steps > 0 ? [here, after] : [here];
    curve.draw([dense, ...of.traces.marks(colourOf), ...dots]);
    const line = { kind: "line", x: seen.map(([x]) => x), y: seen.map(([, y]) => y) };
    course.draw([dense, { ...line, class: "gp-corrected" }, at(...seen.at(-1), "gp-corrected")], {
      x: { to: of.steps },
    });
    const shares = sharesOf(masks, of.parts);
    drawShares(matrices, shares, countKept(masks) / of.total);
    go.textContent = walk.isRunning() ? "Pause" : "Train";
    go.disabled = trained();
    const kept = countKept(masks);
    const counts = { weights: of.total, kept, zeros: of.total - kept, steps };
    const facts = { ...setting, ...counts, dense: of.accuracy, pruned, corrected: accuracy };
    const stay = Object.entries(shares).map(([name, value]) => `${name}: ${value}`);
    say(stage, { ...facts, shares: stay.join(", ") }, sentence({ ...facts, of, shares }));
    publish(model, { accuracy });
  };
  const request = drawer(stage, draw);
  const walk = animator(stage, { step, draw, done: () => request() });

  function follow() {
    const setting = chosen();
    kind.set(setting.kind);
    sparsity.set(100 * setting.sparsity);
    ranking.set(setting.ranking);
    scope.set(setting.scope);
    now = null;
    walk.stop();
    request();
  }
  const ask = listen(stage, model, SETTINGS, follow);
  stage.root.numbers = () => flattenLayered(shown().net);
  follow();
  return closing(stage);
}

function unpack({ layers, numbers, parts, steps, rate, batch }, test) {
  const dense = createLayered(layersNamed(layers), readHalves(numbers));
  const read = createReader(dense, test, LAYERED);
  const uniform = generator(0);
  const scores = {
    smallest: magnitudeScores(dense.weights),
    random: dense.weights.map((array) => array.map(() => uniform())),
  };
  const total = countAll(dense.weights);
  const { accuracy } = read(dense);
  const traces = createTraces(4);
  return { ...{ dense, read, scores, total, accuracy, traces }, ...{ parts, steps, rate, batch } };
}

// Which share of its weights each part keeps: some matrices hold several parts, one under the other.
function sharesOf(masks, parts) {
  const pairs = masks.flatMap((mask, m) => {
    const size = mask.length / parts[m].length;
    return parts[m].map((name, p) => {
      const part = mask.subarray(p * size, (p + 1) * size);
      return [name, part.reduce((a, b) => a + b, 0) / size];
    });
  });
  return Object.fromEntries(pairs);
}

function drawShares(chart, shares, mean) {
  const [names, heights] = [Object.keys(shares), Object.values(shares)];
  const places = names.map((_, i) => i);
  const to = Math.min(1, 1.15 * Math.max(...heights, mean));
  chart.draw(
    [
      { kind: "bars", x: places, y: heights, width: 0.7, class: "gp-dense" },
      { kind: "rule", y: mean, class: "gp-predicted", text: "all" },
    ],
    {
      x: { from: -0.6, to: names.length - 0.4, ticks: places, format: (i) => names[i] },
      y: { to },
    },
  );
}

function sentence({ kind, kept, weights, zeros, dense, pruned, corrected, steps, of, shares }) {
  const counts = `${whole(kept)} of the ${kind} network's ${whole(weights)} weights are left, ${whole(zeros)} are zero.`;
  const read = `It read ${percent(dense)} of the test digits before, and ${percent(pruned)} pruned`;
  const after = steps > 0 ? `; after ${steps} of ${of.steps} steps of training it reads ` : "";
  const names = Object.keys(shares).sort((a, b) => shares[a] - shares[b]);
  const [least, most] = [names[0], names.at(-1)].map((name) => [name, percent(shares[name])]);
  const ends =
    least[1] === most[1]
      ? `Each of its matrices keeps ${most[1]}.`
      : `Of its matrices “${least[0]}” keeps least (${least[1]}), “${most[0]}” most (${most[1]}).`;
  return `${counts} ${read}${after}${steps > 0 ? percent(corrected) : ""}. ${ends}`;
}
