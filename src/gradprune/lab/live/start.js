// Start page: show a digit to a network, take its weights away, train what is left.
import { createChart } from "./chart.js";
import { button, slider } from "./controls.js";
import { readFloats, readNetwork, readSplit } from "./examples.js";
import { copyNetwork, createWorkspace, flatten, forward, predictions } from "./network.js";
import { createPad } from "./pad.js";
import { createPixels } from "./pixels.js";
import { applyMasks, magnitudeScores, pruneMasks } from "./rank.js";
import { percent, whole } from "./reading.js";
import { animator, closing, createStage, drawer, element, listen, publish, say } from "./stage.js";
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
  const total = dense.weights.reduce((sum, weights) => sum + weights.length, 0);
  const strongest = Math.max(...dense.weights[0].map(Math.abs));

  // `ranked` is what the slider takes weights from: the trained network, or what came out of training again.
  let ranked = dense;
  let net = copyNetwork(dense);
  let masks = [];
  let trainedAt = 0; // the sparsity at which it was trained again, after which no weight comes back
  let training = null;
  let before = null; // the accuracy when training again first began, of what is ranked
  const work = createWorkspace(net, test.rows);
  const single = createWorkspace(net, 1);

  const stage = createStage(el, "start", "A network that reads digits");
  const removed = slider({
    label: "weights removed",
    min: 0,
    max: 99,
    step: 1,
    value: 0,
    format: (value) => `${value} %`,
    change: (value) => publish(model, { sparsity: value / 100 }),
  });
  const again = button("Train again", () => startTraining());
  const reset = button("Reset", () => {
    trainedAt = 0;
    traces.clear();
    publish(model, { sparsity: 0 });
    pad.pick(FIRST);
    follow();
  });
  stage.controls.append(removed.root, again, reset);

  const curve = createChart({
    title: "Digits it reads",
    legend: [
      ["weights removed", "gp-pruned"],
      ["trained again", "gp-corrected"],
    ],
    x: { label: "weights removed, %", from: 0, to: 100 },
    y: { label: "share read correctly", from: 0, to: 1 },
  });
  const pad = createPad({
    examples: firstOfEach(test, classes),
    levels,
    change: () => request(),
  });
  const bars = createChart({
    title: "The network's answer",
    x: {
      label: "digit",
      from: -0.6,
      to: classes - 0.4,
      ticks: Array.from({ length: classes }, (_, i) => i),
    },
    y: { label: "probability", from: 0, to: 1 },
  });
  const traces = createTraces(6);
  const pixels = createPixels({
    label: "The weights of the first layer",
    units: dense.sizes[1],
    columns: 8,
    tile: [8, 8],
  });
  const caption = element(
    "figcaption",
    {},
    `Weights from an 8 × 8 picture, a square for each of ${dense.sizes[1]} units: blue positive, orange negative, blank gone`,
  );
  const picture = element("figure", { class: "gp-live-chart" }, caption, pixels.root);
  stage.panels.append(curve.root, pad.root, bars.root, picture);

  function prune(sparsity) {
    walk.stop();
    if (sparsity < trainedAt || trainedAt === 0) {
      ranked = dense;
      trainedAt = 0;
      before = null;
    }
    net = copyNetwork(ranked);
    masks = pruneMasks(magnitudeScores(ranked.weights), sparsity, "global");
    applyMasks(net.weights, masks);
    training = null;
  }

  const read = () => {
    const answers = predictions(forward(net, test.inputs, test.rows, work), classes);
    let right = 0;
    answers.forEach((answer, row) => {
      if (answer === test.labels[row]) right += 1;
    });
    return right / test.rows;
  };

  const draw = () => {
    const accuracy = read();
    const answer = softmax(forward(net, pad.input(), 1, single));
    const digit = answer.indexOf(Math.max(...answer));
    bars.draw([
      { kind: "bars", x: answer.map((_, i) => i), y: answer, width: 0.7, class: "gp-dense" },
    ]);
    const colour = before === null ? "gp-pruned" : "gp-corrected";
    if (!walk.isRunning()) traces.add(colour, 100 * model.get("sparsity"), accuracy);
    const here = { x: [100 * model.get("sparsity")], y: [accuracy], class: colour };
    curve.draw([...traces.marks((key) => key), { kind: "points", ...here }]);
    pixels.draw(net.weights[0], masks[0], 0.6 * strongest);
    const kept = masks.reduce((sum, mask) => sum + mask.reduce((a, b) => a + b, 0), 0);
    const sparsity = model.get("sparsity");
    const facts = { sparsity, accuracy, kept, digit, steps: training?.steps ?? 0 };
    say(
      stage,
      facts,
      `${state({ rows: test.rows, accuracy, kept, total, before, trainedAt, sparsity })} ${reading(pad.digit(), digit, answer[digit])}`,
    );
    again.disabled = walk.isRunning() || sparsity === 0;
    publish(model, { accuracy });
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
      trainedAt = model.get("sparsity");
      request();
    },
  });

  function startTraining() {
    before ??= read();
    training = createTraining({
      ...{ net, inputs: train.inputs, labels: train.labels, classes, masks },
      ...{ batch: BATCH, seed: 0, optimizer: OPTIMIZER },
    });
    walk.start();
  }

  function follow() {
    removed.set(Math.round(100 * model.get("sparsity")));
    prune(model.get("sparsity"));
    request();
  }
  listen(stage, model, ["sparsity"], follow);
  pad.pick(FIRST);
  follow();
  stage.root.numbers = () => flatten(net);
  return closing(stage);
}

function state({ rows, accuracy, kept, total, before, trainedAt, sparsity }) {
  const weights =
    kept === total
      ? `all its ${whole(total)} weights`
      : `${whole(kept)} of its ${whole(total)} weights`;
  const has = `With ${weights} the network reads ${percent(accuracy)} of ${rows} digits that it has not seen before`;
  if (before === null) return `${has}.`;
  if (trainedAt > 0 && sparsity > trainedAt)
    return `${has}; it was trained again at ${percent(trainedAt)}, and has lost more since.`;
  return `${has} (${percent(before)} before it was trained again).`;
}

function reading(digit, answer, sureness) {
  const article = answer === 8 ? "an" : "a";
  const read = `is read as ${article} ${answer}`;
  const sure = `with probability ${sureness.toFixed(2)}`;
  if (digit === null) return `What you drew ${read}, ${sure}.`;
  return `The ${digit} shown ${read}${answer === digit ? "" : ", wrongly"}, ${sure}.`;
}

function softmax(scores) {
  const highest = Math.max(...scores);
  const raised = Array.from(scores, (score) => Math.exp(score - highest));
  const sum = raised.reduce((a, b) => a + b);
  return raised.map((value) => value / sum);
}

// The first test example of each class.
function firstOfEach({ inputs, labels, rows }, classes) {
  const size = inputs.length / rows;
  return Array.from({ length: classes }, (_, digit) => {
    const row = labels.indexOf(digit);
    return inputs.slice(row * size, (row + 1) * size);
  });
}
