// Chapter 1: how much of the gradient arrives at the first layer of a deep network, and does that layer learn?
import { createChart, plain, scientific } from "./chart.js";
import { button, choice, slider } from "./controls.js";
import { readFloats, readSplit } from "./examples.js";
import { distance, norm } from "./gradients.js";
import { crossEntropy } from "./losses.js";
import { gradientFactors } from "./meanfield.js";
import {
  backward,
  copyNetwork,
  createNetwork,
  createWorkspace,
  flatten,
  forward,
  parameterCount,
} from "./network.js";
import { createReader, percent } from "./reading.js";
import {
  animator,
  closing,
  createStage,
  drawer,
  listen,
  publish,
  say,
  sayPrecision,
  settingsOf,
} from "./stage.js";
import { createTraining, trainSteps } from "./training.js";

const ROWS = 64; // examples whose gradient is shown
const STEPS = 200;
const OPTIMIZER = { rate: 0.05, momentum: 0, decay: 0 };
const SETTINGS = ["depth", "activation", "scale"];
const NAMED = { 1: "Xavier", 1.4: "about He" };
const FLOOR = 1e-45; // below it single precision has no number but 0
const NO_NUMBER = "no number any more";
const layersIn = (count) => (count === 1 ? "1 layer" : `${count} layers`);

const power = (value) => {
  if (value === 0) return "0";
  if (!Number.isFinite(value)) return "beyond single precision";
  if (value < 0.01 || value >= 1000) return scientific(value);
  return value < 100 ? value.toPrecision(2) : value.toFixed(0);
};

// A small share, as one says it.
const PARTS = [
  [1e18, "more than a million million million"],
  [1e12, "million million"],
  [1e6, "million"],
  [1e3, "thousand"],
];
const onePartIn = (share) => {
  if (!(share > 0 && share < 1e-3)) return "";
  const [size, name] = PARTS.find(([least]) => 1 / share >= least);
  return ` (one part in ${size === 1e18 ? name : `${plain(Number((1 / share / size).toPrecision(2)))} ${name}`})`;
};

// The axes reach a little beyond the last layer and the gradients.
const ENDS = [7, 12, 22, 32, 42, 62];
const FLOORS = [1e-4, 1e-8, 1e-16, 1e-24];
const CEILINGS = [10, 1e4, 1e8, 1e16];

export function render({ model, el }) {
  const draws = readFloats(model.get("_draws"));
  const width = model.get("_width");
  const test = readSplit(model.get("_test"));
  const train = readSplit(model.get("_train"));
  const pixels = train.inputs.length / train.rows;
  const classes = model.get("_classes");
  const shown = {
    inputs: train.inputs.subarray(0, ROWS * pixels),
    labels: train.labels.subarray(0, ROWS),
  };
  const square = norm([shown.inputs]) ** 2 / shown.inputs.length;
  const chosen = () => settingsOf(model, SETTINGS);
  const first = chosen();

  let fresh = null; // the network of the setting, as it is initialised
  let net = null;
  let training = null;
  let accuracy = Number.NaN;
  let losses = [];
  let broken = false; // the loss is no number any more
  let work = null; // for the gradient of what is shown
  let norms = []; // of that gradient, layer by layer
  let seen = -1; // after how many steps it was
  let predicted = []; // the same by formula, for the fresh network
  let foretold = Number.NaN; // first over last of these

  function start() {
    walk.stop();
    fresh = networkOf(chosen(), draws, pixels, width, classes);
    net = copyNetwork(fresh);
    training = createTraining({
      ...{ net, inputs: train.inputs, labels: train.labels, classes },
      ...{ batch: ROWS, seed: 0, optimizer: OPTIMIZER },
    });
    [losses, broken, accuracy] = [[], false, Number.NaN];
    work = createWorkspace(net, ROWS);
    seen = -1;
    look();
    predicted = predictedNorms(chosen(), norms, square);
    foretold = predicted[0] / norms.at(-1);
    request();
  }

  function look() {
    if (seen !== training.steps) norms = gradientNorms();
    seen = training.steps;
  }

  // The norm of the loss gradient at the input of each layer's activation, and at the output, first layer first.
  function gradientNorms() {
    const gradient = new Float64Array(ROWS * classes);
    crossEntropy(forward(net, shown.inputs, ROWS, work), shown.labels, classes, gradient);
    backward(net, shown.inputs, ROWS, work, gradient);
    return work.deltas.map((delta) => norm([delta]));
  }

  const stage = createStage(el, "depth", "The gradient of a deep network, layer by layer");
  const depth = slider({
    label: "hidden layers",
    ...{ min: 1, max: 60, step: 1, value: first.depth },
    change: (value) => publish(model, { depth: value }),
  });
  const scale = slider({
    label: "weight scale, in 1/√n",
    ...{ min: 0.2, max: 3, step: 0.1, value: first.scale },
    format: (value) => (NAMED[value] ? `${value.toFixed(1)} (${NAMED[value]})` : value.toFixed(1)),
    change: (value) => publish(model, { scale: value }),
  });
  const activation = choice({
    label: "Activation",
    options: ["sigmoid", "tanh", "relu", "linear"].map((name) => [name, name]),
    value: first.activation,
    change: (is) => publish(model, { activation: is }),
  });
  const go = button("Train", () => {
    if (walk.isRunning()) walk.stop();
    else if (training.steps < STEPS && !broken) walk.start();
    request();
  });
  const reset = button("Reset", () => {
    publish(model, first);
    ask();
  });
  stage.controls.append(depth.root, scale.root, activation.root, go, reset);

  const layers = { label: "layer, first to last", from: 0, to: ENDS.at(-1) };
  const charts = {
    gradient: createChart({
      title: "The gradient's norm",
      legend: [
        ["this network", "gp-dense"],
        ["by formula, before training", "gp-predicted"],
      ],
      x: layers,
      y: { label: "norm", from: 1e-38, to: 1e6, log: true },
    }),
    moved: createChart({
      title: "How far each layer has moved",
      x: layers,
      y: { label: "change, of its norm", from: 1e-9, to: 10, log: true },
    }),
    loss: createChart({
      title: "The training loss",
      x: { label: "training step", from: 0, to: STEPS },
      y: { label: "loss", from: 0, to: 3 },
    }),
  };
  stage.panels.append(...Object.values(charts).map((chart) => chart.root));
  sayPrecision(stage);

  const draw = () => {
    const setting = chosen();
    // Of a running training every fourth frame looks at all gradients: that costs as much as a step. Not the last one,
    // which reads the test digits.
    if (!walk.isRunning() || training.steps % 4 === 2) look();
    const moved = net.weights.map((weights, l) => movement(weights, fresh.weights[l]));
    const at = norms.map((_, l) => l + 1);
    const drawable = norms.map((value) =>
      value > FLOOR && Number.isFinite(value) ? value : Number.NaN,
    );
    const finite = [...norms.filter(Number.isFinite), ...predicted];
    const [lowest, highest] = [Math.min(...finite), Math.max(...finite)];
    const axes = { x: { to: ENDS.find((end) => end > at.length) } };
    const up = {
      from: FLOORS.find((floor) => lowest > floor) ?? 1e-46, // single precision's last few are there
      to: CEILINGS.find((ceiling) => highest < ceiling) ?? 1e38,
    };
    const marks = [
      { kind: "line", x: at, y: predicted, class: "gp-predicted gp-live-dashed" },
      {
        kind: "points",
        x: at,
        y: drawable.map((y) => (y > 0 ? y : 1e-60)),
        radius: 2,
        class: "gp-dense",
      },
    ];
    const word = (text, y, x = 0.5) => ({ kind: "word", x: x * axes.x.to, y, text });
    const height = (share) => up.from * (up.to / up.from) ** share;
    const lost = norms.filter((value) => value <= FLOOR).length;
    const beyond = norms.filter((value) => !Number.isFinite(value)).length;
    // Where the first layers have lost their points, the others rise to the right of these words.
    if (lost) {
      marks.push(word(`${layersIn(lost)} below the`, height(0.72), 0.27));
      marks.push(word("smallest number", height(0.63), 0.27));
    }
    if (beyond) marks.push(word(`${layersIn(beyond)} beyond the largest number`, height(0.92)));
    charts.gradient.draw(marks, { ...axes, y: up });
    const done = training.steps;
    const visible = moved.map((value) =>
      value > 0 && Number.isFinite(value) ? value : Number.NaN,
    );
    const still = moved.filter((value) => value === 0).length;
    const left = [{ kind: "line", x: at, y: visible, class: "gp-corrected" }];
    if (done === 0) left.push(word("press Train", 1e-4));
    else if (still) left.push(word(`not moved: ${layersIn(still)}`, 1e-2, 0.27));
    if (broken) left.push(word(NO_NUMBER, 1e-4));
    charts.moved.draw(left, axes);
    const best = { kind: "rule", y: Math.log(classes), class: "gp-random", text: "guessing" };
    const curve = [
      best,
      { kind: "line", x: losses.map((_, i) => i + 1), y: losses, class: "gp-dense" },
    ];
    if (done === 0) curve.push({ kind: "word", x: STEPS / 2, y: 1, text: "press Train" });
    if (broken) curve.push({ kind: "word", x: STEPS / 2, y: 1, text: NO_NUMBER });
    charts.loss.draw(curve);
    if (!walk.isRunning() && done > 0 && Number.isNaN(accuracy))
      accuracy = createReader(net, test)(net).accuracy;
    go.textContent = walk.isRunning() ? "Pause" : "Train";
    go.disabled = done >= STEPS || broken;
    const ratios = { ratio: norms[0] / norms.at(-1), predicted: foretold };
    const facts = {
      ...setting,
      ...ratios,
      steps: done,
      moved: moved[0],
      loss: losses.at(-1) ?? "",
    };
    say(
      stage,
      { ...facts, accuracy: Number.isNaN(accuracy) ? "" : accuracy },
      sentence(facts, accuracy, broken),
    );
    publish(model, { accuracy: Number.isNaN(accuracy) ? null : accuracy });
  };
  const request = drawer(stage, draw);

  const walk = animator(stage, {
    step() {
      accuracy = Number.NaN;
      losses.push(trainSteps(training, 1));
      broken = !Number.isFinite(losses.at(-1));
      const more = training.steps < STEPS && !broken;
      if (!more) accuracy = createReader(net, test)(net).accuracy; // so that the last frame has it
      return more;
    },
    draw,
    done: () => request(),
  });

  function follow() {
    const setting = chosen();
    depth.set(setting.depth);
    scale.set(setting.scale);
    activation.set(setting.activation);
    start();
  }
  const ask = listen(stage, model, SETTINGS, follow);
  stage.root.numbers = () => flatten(net);
  stage.root.gradients = gradientNorms;
  stage.root.train = (steps) => trainSteps(training, steps);
  follow();
  return closing(stage);
}

// The first weights come from the first draws, those of the output from the last: a deeper network begins as the
// shallower one. Twin: Depth.network in depth.py.
function networkOf({ depth, activation, scale }, draws, pixels, width, classes) {
  const sizes = [pixels, ...new Array(depth).fill(width), classes];
  const numbers = new Float32Array(parameterCount(sizes)); // no biases
  let [from, at] = [0, 0];
  for (let layer = 0; layer <= depth; layer++) {
    const [inputs, outputs] = [sizes[layer], sizes[layer + 1]];
    const count = inputs * outputs;
    if (layer === depth) from = draws.length - count;
    const deviation = scale / Math.sqrt(inputs);
    for (let i = 0; i < count; i++) numbers[at + i] = draws[from + i] * deviation;
    from += count;
    at += count + outputs;
  }
  return createNetwork(sizes, activation, numbers);
}

// From the last hidden layer down, by the factors of wide random layers.
function predictedNorms({ activation, scale, depth }, norms, square) {
  const factors = gradientFactors(activation, scale, depth, square);
  const predicted = norms.slice();
  for (let layer = depth - 2; layer >= 0; layer--) {
    predicted[layer] = predicted[layer + 1] * Math.sqrt(factors[layer]);
  }
  return predicted;
}

const movement = (now, before) => distance(now, before) / norm([before]);

function said(ratio) {
  if (ratio === 0) return "0: what is left is below single precision's smallest number";
  if (!Number.isFinite(ratio)) return "beyond single precision's largest number";
  return `${power(ratio)} ${ratio < 1 ? "of" : "times"} what it is at the output${onePartIn(ratio)}`;
}

function sentence({ ratio, predicted, steps, moved }, accuracy, broken) {
  const arrives = `At the first layer the gradient is ${said(ratio)}`;
  const start = `${arrives}; the formula${steps > 0 ? ", before training," : ""} says ${power(predicted)}.`;
  if (broken)
    return `${start} After ${steps} steps the loss is no number any more: the network exploded.`;
  if (steps === 0) return start;
  const read = Number.isNaN(accuracy)
    ? ""
    : `, and the network reads ${percent(accuracy)} of the test digits`;
  return `${start} After ${steps} steps layer 1 has moved by ${percent(moved)} of its norm${read}.`;
}
