// Chapter 9: four workers train one network; when may they choose masks, and what does an average make of them?
import { createChart } from "./chart.js";
import { button, choice, slider } from "./controls.js";
import {
  advance,
  branchOff,
  createCourse,
  crewOf,
  isDone,
  isPruned,
  isTrained,
  momentOf,
  unprune,
} from "./course.js";
import { differing, keepers, WAYS, WORKERS } from "./crew.js";
import { readNetwork, readSplit } from "./examples.js";
import { flatten } from "./network.js";
import { createPicture } from "./pixels.js";
import { countAll, createReader, goingOn, joinBytes, percent, whole } from "./reading.js";
import {
  animator,
  closing,
  createStage,
  drawer,
  element,
  listen,
  publish,
  say,
  settingsOf,
} from "./stage.js";

const OPTIMIZER = { rate: 0.05, momentum: 0.9, decay: 0 };
const BATCH = 64;
const LARGEST = 0.01; // of the entries, where not all are sent
const STRIDE = 2; // steps a frame
const TRAINING = ["way", "period", "age", "sent"]; // to change one starts the training anew,
const PRUNING = ["late", "decides", "sparsity"]; // one of these goes back to its end

export function render({ model, el }) {
  const untrained = readNetwork(model.get("_network"));
  const test = readSplit(model.get("_test"));
  const train = readSplit(model.get("_train"));
  const read = createReader(untrained, test);
  const total = countAll(untrained.weights);
  const settings = (names) => settingsOf(model, names);
  const first = settings([...TRAINING, ...PRUNING]);
  const how = () => settings(PRUNING);

  let course = null;
  function start() {
    walk.stop();
    const { way, period, age, sent } = settings(TRAINING);
    const made = {
      ...{ net: untrained, way, period, age, density: sent === "all" ? 1 : LARGEST },
      ...{ inputs: train.inputs, labels: train.labels, classes: untrained.sizes.at(-1) },
      ...{ batch: BATCH, optimizer: OPTIMIZER },
    };
    course = createCourse(made, read);
    request();
  }
  function goBack() {
    walk.stop();
    unprune(course);
    request();
  }

  const stage = createStage(el, "workers", "Four workers train and prune one network");
  const controls = createControls(first, (change) => publish(model, change));
  const go = button("Train", () => {
    if (walk.isRunning()) walk.stop();
    else if (!isTrained(course)) walk.start();
    request();
  });
  const prune = button("Prune", () => {
    if (walk.isRunning()) walk.stop();
    else if (isTrained(course)) {
      branchOff(course);
      walk.start();
    }
    request();
  });
  const reset = button("Reset", () => {
    publish(model, first);
    ask();
  });
  const buttons = element("div", {}, go, " ", prune, " ", reset);
  stage.controls.append(...controls.roots, buttons);

  const panels = createPanels(untrained.sizes[1]);
  stage.panels.append(...Object.values(panels).map(({ root }) => root));

  const draw = () => {
    const setting = settings([...TRAINING, ...PRUNING]);
    const crew = crewOf(course);
    drawPanels(panels, course, setting, total);
    const running = walk.isRunning();
    go.textContent = running && !course.branch ? "Pause" : "Train";
    go.disabled = isTrained(course);
    prune.textContent = running && course.branch ? "Pause" : "Prune";
    prune.disabled = !isTrained(course) || isDone(course);
    const { accuracies } = course.reads.at(-1);
    const facts = {
      ...{ ...setting, steps: crew.steps, pruned: isPruned(course), alive: course.alive },
      accuracy: accuracies.reduce((sum, value) => sum + value) / accuracies.length,
      differ: isPruned(course) ? differing(crew) : 0,
      zeros: course.zeros.at(-1)?.[1] ?? 0,
      bytes: crew.steps > 0 ? crew.bytes / WORKERS / crew.steps : 0,
    };
    say(stage, facts, sentence(facts, course, total));
    const masks = crew.workers.flatMap((worker) => worker.masks ?? []);
    publish(model, { accuracy: facts.accuracy, _shown: goingOn(setting, masks) });
  };
  const request = drawer(stage, draw);
  const walk = animator(stage, {
    step: () => advance(course, STRIDE, how()),
    draw,
    done: () => request(),
  });

  function show() {
    const setting = settings([...TRAINING, ...PRUNING]);
    if (setting.late < setting.period) controls.set(setting);
    else publish(model, { late: setting.period - 1 }); // which comes back here
  }
  const ask = listen(stage, model, TRAINING, () => {
    show();
    start();
  });
  listen(stage, model, PRUNING, () => {
    show();
    goBack();
  });
  stage.root.shown = () => model.get("_shown");
  stage.root.numbers = (worker) => [...flatten(crewOf(course).workers[worker].net)];
  stage.root.masks = () => crewOf(course).workers.map(({ masks }) => [...joinBytes(masks)]);
  stage.root.advance = (count) => {
    if (isTrained(course)) branchOff(course);
    advance(course, count, how());
    request();
  };
  show();
  start();
  return closing(stage);
}

function createControls(first, change) {
  const way = choice({
    label: "Four workers",
    options: [
      ["synchronous", "in step (synchronous)"],
      ["local", "averaged now and then (local SGD)"],
      ["pairs", "pairs, averaged (semi-synchronous)"],
      ["asynchronous", "as each comes (asynchronous)"],
    ],
    value: first.way,
    change: (is) => change({ way: is }),
  });
  const period = slider({
    label: "steps between averages",
    ...{ min: 2, max: 16, step: 1, value: first.period },
    change: (value) => change({ period: value }),
  });
  const age = slider({
    label: "staleness of a gradient, in steps",
    ...{ min: 0, max: 8, step: 1, value: first.age },
    change: (value) => change({ age: value }),
  });
  const sent = choice({
    label: "They send",
    options: [
      ["all", "all numbers"],
      ["largest", "the largest 1 %"],
    ],
    value: first.sent,
    change: (is) => change({ sent: is }),
  });
  const moment = slider({
    label: "prune, steps after an average",
    ...{ min: 0, max: first.period - 1, step: 1, value: first.late },
    change: (value) => change({ late: value }),
  });
  const decides = choice({
    label: "Masks chosen by",
    options: [
      ["each", "each for itself"],
      ["one", "one for all"],
    ],
    value: first.decides,
    change: (is) => change({ decides: is }),
  });
  const controls = { way, period, age, sent, late: moment, decides };
  const set = (setting) => {
    moment.input.max = setting.period - 1;
    for (const [name, control] of Object.entries(controls)) control.set(setting[name]);
    period.root.hidden = moment.root.hidden = !WAYS[setting.way].averaged;
    age.root.hidden = setting.way !== "asynchronous";
  };
  return { roots: Object.values(controls).map(({ root }) => root), set };
}

function createPanels(units) {
  return {
    accuracy: createChart({
      title: "Test digits read (dashed: pruning)",
      legend: [
        ["worker 1", "gp-dense"],
        ["others", "gp-random"],
      ],
      x: { label: "step", from: 0, to: 1 },
      y: { label: "share read correctly", from: 0, to: 1 },
    }),
    share: createChart({
      title: "Zeros of worker 1 (dashed: averages)",
      x: { label: "steps since the average before pruning", from: 0, to: 1 },
      y: { label: "share of zeros", from: 0, to: 1 },
    }),
    picture: createPicture(
      "The first layer's weights: blue kept by all, orange by some, blank by none",
      units,
      16,
    ),
  };
}

function drawPanels({ accuracy, share, picture }, course, setting, total) {
  const pruning = { kind: "rule", x: momentOf(course, setting) };
  accuracy.draw([...accuracyMarks(course), pruning], { x: { to: 2 * course.length } });
  const every = course.averaged ? setting.period : 0;
  share.draw(...zeroMarks(course, every, setting.sparsity, total));
  const kept = keepers(crewOf(course), 0);
  const signs = kept.map((count) => (count === WORKERS ? 1 : -1));
  picture.draw(signs, kept, 1);
}

function accuracyMarks({ reads }) {
  const x = reads.map(({ steps }) => steps);
  const lines = reads[0].accuracies.map((_, at) => {
    const y = reads.map(({ accuracies }) => accuracies[at]);
    const name = at === 0 ? "gp-dense" : "gp-random";
    const end = { kind: "points", x: x.slice(-1), y: y.slice(-1), class: name };
    return [{ kind: "line", x, y, class: name }, end];
  });
  return lines.reverse().flat(); // the first worker's on top
}

// Three periods after the average, or 24 steps.
function zeroMarks({ zeros, length }, every, sparsity, total) {
  const to = every > 0 ? 3 * every : 24;
  const seen = zeros.filter(([step]) => step <= length + to);
  const [x, y] = [seen.map(([step]) => step - length), seen.map(([, count]) => count / total)];
  const averages = every > 0 ? [1, 2, 3].map((at) => ({ kind: "rule", x: at * every })) : [];
  const low = Math.min(sparsity - 0.02, ...y.map((value) => value - 0.002));
  const marks = [...averages, { kind: "line", x, y, class: "gp-pruned" }];
  return [marks, { x: { to }, y: { from: low, to: sparsity + 0.004 } }];
}

function sentence(facts, { averaged, length }, total) {
  const { steps, pruned, accuracy, late, decides, sparsity, differ, zeros, bytes, alive } = facts;
  if (steps === 0) return "Four workers have the same network, not trained yet. Press Train.";
  const sent = `each has sent ${whole(Math.round(bytes))} bytes a step`;
  const reads = `the workers read ${percent(accuracy)} of the test digits; ${sent}`;
  const gone = `the ${Number((100 * sparsity).toFixed(1))} % of its weights that are smallest`;
  if (!pruned) {
    const next = averaged ? `${late} steps after an average` : "now";
    const then = decides === "each" ? `each removes ${gone}` : `worker 1 removes ${gone}, for all`;
    return `After ${steps} of ${length} steps ${reads}.${steps < length ? "" : ` Press Prune: ${next}, ${then}.`}`;
  }
  const masks = `The masks differ in ${differ} of ${whole(total)} weights`;
  const since = averaged ? "after the latest average" : "after a step of each";
  const back = `${whole(alive)} pruned weights are alive again ${since}`;
  return `${masks}; ${back}: ${percent(zeros / total)} are zero. After ${steps} steps ${reads}.`;
}
