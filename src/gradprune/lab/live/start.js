// Start page: show a digit to a network, take its weights away, train what is left.
import { createChart } from "./chart.js";
import { button, slider } from "./controls.js";
import { readFloats, readNetwork, readSplit } from "./examples.js";
import { softmaxRow } from "./losses.js";
import { assign, copyNetwork, createWorkspace, flatten, forward } from "./network.js";
import { createPad } from "./pad.js";
import { createPicture } from "./pixels.js";
import { applyMasks, magnitudeScores, pruneMasks } from "./rank.js";
import { countAll, countKept, createReader, goingOn, percent, whole } from "./reading.js";
import {
  animator,
  closing,
  createStage,
  drawer,
  listen,
  publish,
  say,
  sayPrecision,
} from "./stage.js";
import { createTraces } from "./trace.js";
import { createTraining, epochSteps, trainSteps } from "./training.js";

const EPOCHS = 5;
const OPTIMIZER = { rate: 0.1, momentum: 0.9, decay: 1e-4 };
const BATCH = 64;
const FIRST = 8; // is lost when nine tenths of the weights go, and comes back

export function render({ model, el }) {
  const dense = readNetwork(model.get("_network"));
  const test = readSplit(model.get("_test"));
  const train = readSplit(model.get("_train"));
  const levels = readFloats(model.get("_test").levels);
  const classes = dense.sizes.at(-1);
  const total = countAll(dense.weights);
  const strongest = Math.max(...dense.weights[0].map(Math.abs));
  const read = createReader(dense, test);
  const single = createWorkspace(dense, 1);
  const answer = new Float32Array(classes);
  const first = model.get("sparsity");

  const net = copyNetwork(dense); // what is shown
  let ranked = dense; // what the slider takes weights from: the trained network, or what came out of training again
  let trained = null; // { at, before }: the sparsity at which that was, and what it read before; no weight comes back
  let masks = [];
  let training = null;
  let began = null; // as `trained`, of a training that runs
  const rises = new Map(); // what was read before training again and after, at each sparsity where that was

  const stage = createStage(el, "start", "A network that reads digits");
  const removed = slider({
    label: "weights removed",
    ...{ min: 0, max: 99, step: 1, value: 0 },
    format: (value) => `${value} %`,
    change: (value) => publish(model, { sparsity: value / 100 }),
  });
  const again = button("Train again", () => startTraining());
  const reset = button("Reset", () => {
    trained = null;
    traces.clear();
    rises.clear();
    publish(model, { sparsity: first });
    pad.pick(FIRST);
    ask();
  });
  stage.controls.append(removed.root, again, reset);

  const traces = createTraces(6);
  const { curve, bars } = createCharts(classes);
  const pad = createPad({
    examples: firstOfEach(test, classes),
    levels,
    change: () => request(),
  });
  const title = "The first layer, unit by unit: blue positive, orange negative, blank gone";
  const picture = createPicture(title, dense.sizes[1]);
  stage.panels.append(curve.root, pad.root, bars.root, picture.root);
  sayPrecision(stage);

  function prune(sparsity) {
    walk.stop();
    if (trained === null || sparsity < trained.at) [ranked, trained] = [dense, null];
    if (began) rises.delete(began.at); // it did not come to its end
    [training, began] = [null, null];
    assign(net, ranked);
    masks = pruneMasks(magnitudeScores(ranked.weights), sparsity, "global");
    applyMasks(net.weights, masks);
  }

  const draw = () => {
    const { accuracy } = read(net);
    const sparsity = model.get("sparsity");
    const running = walk.isRunning();
    const colour = running || trained ? "gp-corrected" : "gp-pruned";
    if (!running) traces.add(colour, 100 * sparsity, accuracy);
    if (running) rises.set(sparsity, { before: began.before, after: accuracy });
    const here = { kind: "points", x: [100 * sparsity], y: [accuracy], class: colour };
    curve.draw([...traces.marks((key) => key), ...[...rises].flatMap(riseMarks), here]);
    softmaxRow(forward(net, pad.input(), 1, single), 0, classes, answer);
    bars.draw([
      { kind: "bars", x: answer.map((_, i) => i), y: answer, width: 0.7, class: "gp-dense" },
    ]);
    picture.draw(net.weights[0], masks[0], 0.6 * strongest);
    const digit = answer.indexOf(Math.max(...answer));
    const facts = { sparsity, accuracy, kept: countKept(masks), digit };
    const has = state({ ...facts, rows: test.rows, total, trained: began ?? trained });
    say(
      stage,
      { ...facts, steps: training?.steps ?? 0 },
      `${has} ${reading(pad.digit(), digit, answer[digit])}`,
    );
    again.disabled = running || sparsity === 0;
    const other = running ? net : ranked; // than the network that Python has
    const numbers = other === dense ? undefined : flatten(other);
    publish(model, { accuracy, _shown: goingOn({ sparsity }, masks, numbers) });
  };
  const request = drawer(stage, draw);

  const walk = animator(stage, {
    step() {
      trainSteps(training, 1);
      return training.steps < EPOCHS * epochSteps(training);
    },
    draw,
    done() {
      ranked = copyNetwork(net);
      [trained, began] = [began, null];
      request();
    },
  });

  function startTraining() {
    const at = model.get("sparsity");
    began = { at, before: trained?.at === at ? trained.before : read(net).accuracy };
    training = trainingOfShown();
    walk.start();
  }
  const trainingOfShown = () =>
    createTraining({
      ...{ net, inputs: train.inputs, labels: train.labels, classes, masks },
      ...{ batch: BATCH, seed: 0, optimizer: OPTIMIZER },
    });

  function follow() {
    removed.set(Math.round(100 * model.get("sparsity")));
    prune(model.get("sparsity"));
    request();
  }
  const ask = listen(stage, model, ["sparsity"], follow);
  pad.pick(FIRST);
  follow();
  stage.root.numbers = () => flatten(net);
  stage.root.train = (steps) => trainSteps(trainingOfShown(), steps);
  stage.root.shown = () => model.get("_shown");
  return closing(stage);
}

function createCharts(classes) {
  const curve = createChart({
    title: "Digits it reads",
    legend: [
      ["weights removed", "gp-pruned"],
      ["trained again", "gp-corrected"],
    ],
    x: { label: "weights removed, %", from: 0, to: 100 },
    y: { label: "share read correctly", from: 0, to: 1 },
  });
  const ticks = Array.from({ length: classes }, (_, i) => i);
  const bars = createChart({
    title: "The network's answer",
    x: { label: "digit", from: -0.6, to: classes - 0.4, ticks },
    y: { label: "probability", from: 0, to: 1 },
  });
  return { curve, bars };
}

function riseMarks([at, { before, after }]) {
  const [x, y] = [100 * at, [before, after]];
  return [
    { kind: "line", x: [x, x], y, class: "gp-corrected" },
    { kind: "points", x: [x], y: [before], class: "gp-pruned" },
    { kind: "points", x: [x], y: [after], class: "gp-corrected" },
  ];
}

function state({ rows, accuracy, kept, total, trained, sparsity }) {
  const weights =
    kept === total
      ? `all its ${whole(total)} weights`
      : `${whole(kept)} of its ${whole(total)} weights`;
  const has = `With ${weights} the network reads ${percent(accuracy)} of ${rows} digits that it has not seen before`;
  if (trained === null) return `${has}.`;
  if (sparsity > trained.at)
    return `${has}; it was trained again at ${percent(trained.at)}, and has lost more since.`;
  return `${has} (${percent(trained.before)} before it was trained again).`;
}

function reading(digit, answer, sureness) {
  const article = answer === 8 ? "an" : "a";
  const read = `is read as ${article} ${answer}`;
  const sure = `with probability ${sureness.toFixed(2)}`;
  if (digit === null) return `What you drew ${read}, ${sure}.`;
  return `The ${digit} shown ${read}${answer === digit ? "" : ", wrongly"}, ${sure}.`;
}

// The first test example of each class.
function firstOfEach({ inputs, labels, rows }, classes) {
  const size = inputs.length / rows;
  return Array.from({ length: classes }, (_, digit) => {
    const row = labels.indexOf(digit);
    return inputs.slice(row * size, (row + 1) * size);
  });
}
