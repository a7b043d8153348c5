// Chapter 3: train with only the largest entries of each gradient; what becomes of the rest?
import { createChart } from "./chart.js";
import { button, slider } from "./controls.js";
import { readNetwork, readSplit } from "./examples.js";
import { createFeedback, norm, topFraction } from "./gradients.js";
import { copyNetwork, flatten, parameterCount } from "./network.js";
import { createReader, percent, whole } from "./reading.js";
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
import { createTraining, trainSteps } from "./training.js";

const STEPS = 270;
const OPTIMIZER = { rate: 0.3, momentum: 0, decay: 0 };
const BATCH = 64;
const MEMORY = 0.9; // of the running loss that is drawn
const MOST = 8; // steps a frame, so that they are seen
const KINDS = { all: "gp-dense", lost: "gp-pruned", kept: "gp-corrected" };
const LEGEND = [
  ["all entries", "gp-dense"],
  ["the rest is lost", "gp-pruned"],
  ["the rest waits", "gp-corrected"],
];
const written = (density) => `${Number((100 * density).toPrecision(2))} %`;

export function render({ model, el }) {
  const untrained = readNetwork(model.get("_network"));
  const test = readSplit(model.get("_test"));
  const train = readSplit(model.get("_train"));
  const read = createReader(untrained, test);
  const entries = parameterCount(untrained.sizes);
  const fewest = Math.round(0.001 * entries); // that a step sends
  const first = model.get("density");

  // A training of which each step gets all of the gradient, or the largest entries; the others are lost or wait.
  function createRun(kind, density) {
    const net = copyNetwork(untrained);
    const run = { net, sent: 0, loss: Number.NaN, seen: [], residuals: null, gone: null };
    run.training = createTraining({
      ...{ net, inputs: train.inputs, labels: train.labels, classes: untrained.sizes.at(-1) },
      ...{ batch: BATCH, seed: 0, optimizer: OPTIMIZER },
      change: ({ all }) => change(run, kind, density, all),
    });
    run.step = () => {
      const loss = trainSteps(run.training, 1);
      run.loss = run.training.steps === 1 ? loss : MEMORY * run.loss + (1 - MEMORY) * loss;
    };
    run.note = () => {
      const { accuracy } = read(net);
      const waiting = norm(restOf(run));
      const { loss, sent, training } = run;
      run.seen.push({ steps: training.steps, sent, loss, accuracy, waiting });
    };
    run.note();
    return run;
  }

  function change(run, kind, density, all) {
    if (kind === "all") {
      run.sent += entries;
      return;
    }
    if (kind === "kept") run.residuals ??= createFeedback(all);
    if (kind === "lost") {
      run.gone ??= createFeedback(all);
      addTo(run.gone, all, 1);
    }
    run.sent += Math.round(topFraction(all, density, run.residuals) * entries);
    if (kind === "lost") addTo(run.gone, all, -1);
  }

  // What is not sent, as one vector: its sum over the steps so far where it is lost, what is left of it where it waits.
  const restOf = (run) => run.residuals ?? run.gone ?? [];

  let runs = {};
  function start() {
    walk.stop();
    const density = model.get("density");
    const made = Object.keys(KINDS).map((kind) => [kind, createRun(kind, density)]);
    runs = Object.fromEntries(made);
    request();
  }

  const stage = createStage(el, "threshold", "Training with the largest entries of the gradient");
  const share = slider({
    label: "entries of the gradient that are sent",
    ...{ min: -3, max: 0, step: 0.05, value: Math.log10(first) },
    format: (value) => written(10 ** value),
    change: (value) => publish(model, { density: Number((10 ** value).toPrecision(4)) }),
  });
  const go = button("Train", () => {
    if (walk.isRunning()) walk.stop();
    else if (runs.all.training.steps < STEPS) walk.start();
    request();
  });
  const reset = button("Reset", () => {
    publish(model, { density: first });
    ask();
  });
  stage.controls.append(share.root, go, reset);

  const steps = { label: "training step", from: 0, to: STEPS };
  const charts = {
    accuracy: createChart({
      title: "Test digits read:",
      legend: LEGEND,
      x: steps,
      y: { label: "share read correctly", from: 0, to: 1 },
    }),
    loss: createChart({
      title: "The loss, for what was sent",
      x: { label: "entries sent", from: fewest, to: entries * STEPS, log: true },
      y: { label: "training loss, running mean", from: 0, to: 2.6 },
    }),
    waiting: createChart({
      title: "What was not sent: waits, or is lost",
      x: steps,
      y: { label: "norm of its sum", from: 0, to: 1 },
    }),
  };
  stage.panels.append(...Object.values(charts).map((chart) => chart.root));
  sayPrecision(stage);

  const lines = (across, up) =>
    Object.entries(KINDS).flatMap(([kind, name]) => {
      const { seen } = runs[kind];
      // Before the first step nothing is sent, which has no place on a logarithmic axis.
      const placed = across === "sent" ? seen.filter(({ sent }) => sent > 0) : seen;
      const [x, y] = [placed.map((row) => row[across]), placed.map((row) => row[up])];
      const end = { kind: "points", x: x.slice(-1), y: y.slice(-1), class: name };
      return [{ kind: "line", x, y, class: name }, end];
    });
  const draw = () => {
    const now = Object.fromEntries(
      Object.keys(KINDS).map((kind) => [kind, runs[kind].seen.at(-1)]),
    );
    charts.accuracy.draw(lines("steps", "accuracy"));
    charts.loss.draw(lines("sent", "loss"));
    const highest = Math.max(
      1,
      ...[...runs.lost.seen, ...runs.kept.seen].map((row) => row.waiting),
    );
    charts.waiting.draw(lines("steps", "waiting"), { y: { to: 1.05 * highest } });
    const done = now.all.steps;
    go.textContent = walk.isRunning() ? "Pause" : "Train";
    go.disabled = done >= STEPS;
    const facts = { density: model.get("density"), steps: done };
    for (const [kind, { sent, accuracy, waiting, loss }] of Object.entries(now)) {
      Object.assign(facts, {
        [kind]: accuracy,
        [`${kind}Sent`]: sent,
        [`${kind}Waiting`]: waiting,
        [`${kind}Loss`]: Number.isNaN(loss) ? "" : loss,
      });
    }
    say(stage, facts, sentence(facts));
    publish(model, { accuracy: now.kept.accuracy });
  };
  const request = drawer(stage, draw);

  // Take up to `count` steps of each, as many as `milliseconds` allow.
  function advance(count, milliseconds = 5) {
    const began = performance.now();
    const end = Math.min(runs.all.training.steps + count, STEPS);
    while (runs.all.training.steps < end && performance.now() - began < milliseconds) {
      for (const run of Object.values(runs)) run.step();
    }
    for (const run of Object.values(runs)) run.note();
  }

  const walk = animator(stage, {
    step() {
      advance(MOST);
      return runs.all.training.steps < STEPS;
    },
    draw,
    done: () => request(),
  });

  function follow() {
    share.set(Math.log10(model.get("density")));
    start();
  }
  const ask = listen(stage, model, ["density"], follow);
  stage.root.numbers = (kind) => flatten(runs[kind].net);
  stage.root.rest = (kind) => restOf(runs[kind]).flatMap((array) => [...array]);
  stage.root.advance = (count) => {
    advance(count, Number.POSITIVE_INFINITY);
    request();
  };
  follow();
  return closing(stage);
}

function addTo(sums, arrays, sign) {
  arrays.forEach((array, a) => {
    for (let i = 0; i < array.length; i++) sums[a][i] += sign * array[i];
  });
}

function sentence(facts) {
  const { density, steps, all, lost, kept, allSent, keptSent, lostWaiting, keptWaiting } = facts;
  if (steps === 0)
    return `${written(density)} of each gradient's entries will be sent. Press Train.`;
  const saved = `${whole(keptSent)} entries sent instead of ${whole(allSent)}`;
  const results = `the network reads ${percent(lost)} of the test digits if the rest is lost, ${percent(kept)} if it waits`;
  const rest = `What was lost has a sum of norm ${lostWaiting.toFixed(1)}, what waits ${keptWaiting.toFixed(1)}`;
  return `After ${steps} steps, with ${saved}, ${results}, and ${percent(all)} if all is sent. ${rest}.`;
}
