// Chapter 5: take weights away at once or in rounds, train what is left, and see which reads better.
import { createChart } from "./chart.js";
import { button, choice, slider } from "./controls.js";
import { readNetwork, readSplit } from "./examples.js";
import { assign, copyNetwork, flatten } from "./network.js";
import { createSgd } from "./optimizer.js";
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
  settingsOf,
} from "./stage.js";
import { createTraining, trainSteps } from "./training.js";

const ABOUT = 180; // steps of each network: as many rounds as there are make it whole
const OPTIMIZER = { rate: 0.05, momentum: 0.9, decay: 0 };
const BATCH = 64;
const SETTINGS = ["sparsity", "rounds", "after"];

export function render({ model, el }) {
  const dense = readNetwork(model.get("_network"));
  const early = readNetwork(model.get("_early"));
  const test = readSplit(model.get("_test"));
  const train = readSplit(model.get("_train"));
  const read = createReader(dense, test);
  const total = countAll(dense.weights);
  const strongest = Math.max(...dense.weights[0].map(Math.abs));
  const chosen = () => settingsOf(model, SETTINGS);
  const first = chosen();

  // A network that is pruned `rounds` times on its way, each time followed by `each` steps.
  function createRun(rounds, each) {
    const { sparsity, after } = chosen();
    const net = copyNetwork(dense);
    const run = { net, rounds, each, masks: null, round: 0, seen: [] };
    run.training = createTraining({
      ...{ net, inputs: train.inputs, labels: train.labels, classes: dense.sizes.at(-1) },
      ...{ batch: BATCH, seed: 0, optimizer: OPTIMIZER },
    });
    run.prune = () => {
      run.round += 1;
      const gone = 1 - (1 - sparsity) ** (run.round / rounds); // equation 5.5
      run.masks = pruneMasks(magnitudeScores(net.weights), gone, "global");
      if (after === "rewinding") assign(net, early);
      applyMasks(net.weights, run.masks);
      run.training.masks = run.masks;
      run.training.state = createSgd(net, OPTIMIZER);
      note(run);
    };
    run.step = () => {
      if (run.training.steps > 0 && run.training.steps % each === 0) run.prune();
      trainSteps(run.training, 1);
      note(run);
    };
    note(run);
    run.prune();
    return run;
  }
  const note = (run) =>
    run.seen.push([run.training.steps, read(run.net).accuracy, 1 - keptShare(run.masks)]);
  const keptShare = (masks) => (masks ? countKept(masks) / total : 1);

  let steps = ABOUT;
  let [once, many] = [null, null];
  function start() {
    walk.stop();
    const { rounds } = chosen();
    const each = Math.round(ABOUT / rounds);
    steps = rounds * each;
    once = createRun(1, steps);
    many = createRun(rounds, each);
    request();
  }

  const stage = createStage(el, "retrain", "One shot beside many rounds");
  const sparsity = slider({
    label: "weights removed in the end",
    ...{ min: 50, max: 99, step: 0.5, value: 100 * first.sparsity },
    format: (value) => `${value.toFixed(1)} %`,
    change: (value) => publish(model, { sparsity: value / 100 }),
  });
  const rounds = slider({
    label: "rounds of the second network",
    ...{ min: 2, max: 10, step: 1, value: first.rounds },
    change: (value) => publish(model, { rounds: value }),
  });
  const after = choice({
    label: "After each pruning",
    options: [
      ["going on", "go on from there"],
      ["rewinding", "rewind to early weights"],
    ],
    value: first.after,
    change: (is) => publish(model, { after: is }),
  });
  const go = button("Train", () => {
    if (walk.isRunning()) walk.stop();
    else if (many.training.steps < steps) walk.start();
    request();
  });
  const reset = button("Reset", () => {
    publish(model, first);
    ask();
  });
  stage.controls.append(sparsity.root, rounds.root, after.root, go, reset);

  const legend = [
    ["one shot", "gp-pruned"],
    ["rounds", "gp-corrected"],
  ];
  const accuracy = createChart({
    title: "Test digits read",
    legend,
    x: { label: "training step", from: 0, to: ABOUT },
    y: { label: "share read correctly", from: 0, to: 1 },
  });
  const removed = createChart({
    title: "Weights removed",
    legend,
    x: { label: "training step", from: 0, to: ABOUT },
    y: { label: "share removed", from: 0, to: 1 },
  });
  const pictureOnce = createPicture("One shot: its first layer", dense.sizes[1]);
  const pictureMany = createPicture("Rounds: its first layer", dense.sizes[1]);
  stage.panels.append(accuracy.root, removed.root, pictureOnce.root, pictureMany.root);
  sayPrecision(stage);

  const lines = (column) => [
    { kind: "line", ...columns(once.seen, column), class: "gp-pruned" },
    { kind: "line", ...columns(many.seen, column), class: "gp-corrected" },
  ];
  const ends = { x: { to: ABOUT } };
  const draw = () => {
    ends.x.to = steps;
    const [a, b] = [once.seen.at(-1), many.seen.at(-1)];
    const here = (point, name, column) => ({
      ...{ kind: "points", x: [point[0]], y: [point[column]], class: name },
    });
    for (const [chart, column] of [
      [accuracy, 1],
      [removed, 2],
    ]) {
      const dots = [here(a, "gp-pruned", column), here(b, "gp-corrected", column)];
      chart.draw([...lines(column), ...dots], ends);
    }
    pictureOnce.draw(once.net.weights[0], once.masks[0], 0.6 * strongest);
    pictureMany.draw(many.net.weights[0], many.masks[0], 0.6 * strongest);
    const done = many.training.steps;
    go.textContent = walk.isRunning() ? "Pause" : "Train";
    go.disabled = done >= steps;
    const kept = { keptOnce: countKept(once.masks), keptMany: countKept(many.masks) };
    const facts = { ...chosen(), steps: done, round: many.round, once: a[1], many: b[1], ...kept };
    say(stage, facts, sentence({ ...facts, of: steps, total }));
    publish(model, { accuracy: b[1], _shown: goingOn(chosen(), many.masks, flatten(many.net)) });
  };
  const request = drawer(stage, draw);
  function step() {
    once.step();
    many.step();
    return many.training.steps < steps;
  }
  const walk = animator(stage, {
    step,
    draw,
    done: () => request(),
  });

  function follow() {
    const setting = chosen();
    sparsity.set(100 * setting.sparsity);
    rounds.set(setting.rounds);
    after.set(setting.after);
    start();
  }
  const ask = listen(stage, model, SETTINGS, follow);
  stage.root.advance = (count) => {
    for (let at = 0; at < count; at++) step();
  };
  stage.root.shown = () => model.get("_shown");
  stage.root.numbers = () => ({ once: flatten(once.net), many: flatten(many.net) });
  follow();
  return closing(stage);
}

function sentence({ steps, of, rounds, round, once, many, keptOnce, keptMany, total }) {
  const so = steps < of ? `After ${steps} of ${of} steps` : `After all ${of} steps`;
  const first = `the network pruned at once, with ${whole(keptOnce)} of ${whole(total)} weights, reads ${percent(once)}`;
  const second = `the one in round ${round} of ${rounds}, with ${whole(keptMany)}, reads ${percent(many)}`;
  return `${so}, ${first} of the test digits; ${second}.`;
}

const columns = (seen, column) => ({
  x: seen.map((row) => row[0]),
  y: seen.map((row) => row[column]),
});
