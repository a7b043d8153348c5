// Chapter 1: how much of the gradient arrives at the first layer of a deep network, and does that layer learn?
import { button, choice, slider } from "./controls.js";
import { createDepthCharts, drawGradient, drawLoss, drawMoved } from "./depthview.js";
import { depthSentence } from "./depthwords.js";
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
import { createReader } from "./reading.js";
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
  let accuracy = null; // on the test digits, after training
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
    [losses, broken, accuracy] = [[], false, null];
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

  const read = () => createReader(net, test)(net).accuracy;

  // The norm of the loss gradient at the input of each layer's activation, and at the output, first layer first.
  function gradientNorms() {
    const gradient = new Float64Array(ROWS * classes);
    crossEntropy(forward(net, shown.inputs, ROWS, work), shown.labels, classes, gradient);
    backward(net, shown.inputs, ROWS, work, gradient);
    return work.deltas.map((delta) => norm([delta]));
  }

  const stage = createStage(el, "depth", "The gradient of a deep network, layer by layer");
  const controls = createControls(first, (change) => publish(model, change));
  const go = button("Train", () => {
    if (walk.isRunning()) walk.stop();
    else if (training.steps < STEPS && !broken) walk.start();
    request();
  });
  const reset = button("Reset", () => {
    publish(model, first);
    ask();
  });
  stage.controls.append(...controls.roots, go, reset);

  const charts = createDepthCharts(STEPS);
  stage.panels.append(...Object.values(charts).map((chart) => chart.root));
  sayPrecision(stage);

  const draw = () => {
    const setting = chosen();
    // Of a running training every fourth frame looks at all gradients: that costs as much as a step. Not the last one,
    // which reads the test digits.
    if (!walk.isRunning() || training.steps % 4 === 2) look();
    const moved = net.weights.map((weights, l) => movement(weights, fresh.weights[l]));
    const { steps } = training;
    drawGradient(charts.gradient, norms, predicted);
    drawMoved(charts.moved, moved, steps, broken);
    drawLoss(charts.loss, losses, classes, broken);
    if (!walk.isRunning() && steps > 0) accuracy ??= read();
    go.textContent = walk.isRunning() ? "Pause" : "Train";
    go.disabled = steps >= STEPS || broken;
    const facts = {
      ...setting,
      ...{ ratio: norms[0] / norms.at(-1), predicted: foretold },
      ...{ steps, moved: moved[0], loss: losses.at(-1) ?? "", accuracy: accuracy ?? "" },
    };
    say(stage, facts, depthSentence({ ...facts, accuracy, broken }));
    publish(model, { accuracy });
  };
  const request = drawer(stage, draw);

  const walk = animator(stage, {
    step() {
      accuracy = null;
      losses.push(trainSteps(training, 1));
      broken = !Number.isFinite(losses.at(-1));
      const more = training.steps < STEPS && !broken;
      if (!more) accuracy = read(); // so that the last frame has it
      return more;
    },
    draw,
    done: () => request(),
  });

  function follow() {
    controls.set(chosen());
    start();
  }
  const ask = listen(stage, model, SETTINGS, follow);
  stage.root.numbers = () => flatten(net);
  stage.root.gradients = gradientNorms;
  stage.root.train = (steps) => trainSteps(training, steps);
  follow();
  return closing(stage);
}

function createControls(first, change) {
  const depth = slider({
    label: "hidden layers",
    ...{ min: 1, max: 60, step: 1, value: first.depth },
    change: (value) => change({ depth: value }),
  });
  const scale = slider({
    label: "weight scale, in 1/√n",
    ...{ min: 0.2, max: 3, step: 0.1, value: first.scale },
    format: (value) => (NAMED[value] ? `${value.toFixed(1)} (${NAMED[value]})` : value.toFixed(1)),
    change: (value) => change({ scale: value }),
  });
  const activation = choice({
    label: "Activation",
    options: ["sigmoid", "tanh", "relu", "linear"].map((name) => [name, name]),
    value: first.activation,
    change: (is) => change({ activation: is }),
  });
  const controls = { depth, scale, activation };
  const set = (setting) => {
    for (const [name, control] of Object.entries(controls)) control.set(setting[name]);
  };
  return { roots: Object.values(controls).map(({ root }) => root), set };
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
