// Chapter 2: put a start on a loss with a wall, and see where gradient descent goes with a bound and without.
import { createChart, plain, powerOfTen } from "./chart.js";
import { button, choice, slider } from "./controls.js";
import { clipByNorm, clipByValue } from "./gradients.js";
import { createHeat } from "./heat.js";
import { animator, closing, createStage, drawer, element, publish, say } from "./stage.js";
import { cellGradient, cellLoss } from "./unroll.js";
import { walk } from "./walk.js";

const W = { from: 0.2, to: 1.4 };
const B = { from: -1, to: 1 };
const FRAMES = 4; // a step, when the walk is played
const KINDS = [
  ["none", "none"],
  ["value", "by value"],
  ["norm", "by norm"],
];
const LEGEND = [
  ["unclipped", "gp-unclipped"],
  ["clipped", "gp-clipped"],
];
const CLIPS = { none: () => {}, value: clipByValue, norm: clipByNorm };
const toBound = (power) => Number((10 ** power).toPrecision(2));
const round = (value) => Number(value.toFixed(2));

export function render({ model, el }) {
  const cell = model.get("_cell"); // { steps, first, target, walk }
  const first = model.get("_start");
  const names = Object.keys(first);
  const chosen = () => Object.fromEntries(names.map((name) => [name, model.get(name)]));
  let shown = cell.walk; // of each walk's steps
  let both = null; // the walks of the setting

  const stage = createStage(el, "clip", "Gradient descent at a wall, with and without clipping");
  const sliders = createSliders((change) => publish(model, change));
  const kind = choice({
    label: "Clip",
    options: KINDS,
    value: first.kind,
    change: (is) => publish(model, { kind: is }),
  });
  const play = button("Play", () => {
    if (player.isRunning()) return player.stop();
    shown = 0;
    frames = 0;
    player.start();
    request();
  });
  const reset = button("Reset", () => {
    publish(model, first);
    follow();
  });
  const ordered = Object.values(sliders).map(({ root }) => root);
  const buttons = element("div", { class: "gp-live-buttons" }, play, " ", reset);
  stage.controls.append(...ordered, kind.root, buttons);

  const map = createHeat({
    title: "The loss from above: press to start elsewhere",
    legend: LEGEND,
    x: { label: "weight w (the greyer, the higher the loss)", ...W },
    y: { label: "bias b", ...B },
    height: (w, b) => 2 * Math.log10(cellLoss([w, b], cell)), // two bands a power of ten
    low: -6,
    high: 13,
    pick: (w, b) => publish(model, { w: round(w), b: round(b) }),
  });
  const state = createChart({
    title: "The cell at the start",
    legend: [
      ["state", "gp-random"],
      ["gradient of the loss", "gp-unclipped"],
    ],
    x: { label: "step of the cell", from: 0, to: cell.steps },
    y: { label: "magnitude", log: true, from: 1e-6, to: 1e8 },
  });
  const length = createChart({
    title: "How long is each step?",
    legend: LEGEND,
    x: { label: "step of descent", from: 0, to: cell.walk },
    y: { label: "length", log: true },
  });
  const angle = createChart({
    title: "Angle to steepest descent",
    legend: LEGEND,
    x: { label: "step of descent", from: 0, to: cell.walk },
    y: { label: "angle, degrees", from: 0 },
  });
  stage.panels.append(map.root, state.root, length.root, angle.root);

  const draw = () => {
    const setting = chosen();
    const walks = [
      [both.unclipped, "gp-unclipped"],
      [both.clipped, "gp-clipped"],
    ].slice(0, setting.kind === "none" ? 1 : 2);
    const begin = { kind: "points", x: [setting.w], y: [setting.b], radius: 5 };
    map.draw([...walks.flatMap(([taken, colour]) => pathMarks(taken, shown, colour)), begin]);
    state.draw(cellMarks(both.cell));
    const marks = (name) =>
      walks.flatMap(([taken, colour]) => stepMarks(taken[name].slice(0, shown), colour));
    length.draw(marks("lengths"), { y: lengthAxis(walks.flatMap(([{ lengths }]) => lengths)) });
    const widest = Math.max(...walks.flatMap(([{ angles }]) => angles));
    const to = [45, 90, 180].find((most) => widest <= most + 1e-9) ?? 180;
    angle.draw(marks("angles"), { y: { to, ticks: [0, to / 3, (2 * to) / 3, to] } });
    say(stage, facts(setting, both, cell, shown), sentence(setting, both, cell));
    play.textContent = player.isRunning() ? "Stop" : "Play";
  };
  const request = drawer(stage, draw);
  let frames = 0;
  const player = animator(stage, {
    step() {
      frames += 1;
      shown = Math.min(cell.walk, Math.floor(frames / FRAMES));
      return shown < cell.walk;
    },
    draw,
    done() {
      shown = cell.walk;
      request();
    },
  });

  function follow() {
    const setting = chosen();
    player.stop();
    shown = cell.walk;
    both = walkBoth(setting, cell);
    for (const name of ["w", "b", "rate", "momentum"]) sliders[name].set(setting[name]);
    sliders.bound.set(Math.log10(setting.bound));
    sliders.bound.input.disabled = setting.kind === "none";
    kind.set(setting.kind);
    request();
  }
  for (const name of names) model.on(`change:${name}`, follow);
  stage.ends.push(() => {
    player.stop();
    for (const name of names) model.off(`change:${name}`, follow);
  });
  follow();
  stage.root.numbers = () => both;
  return closing(stage);
}

function createSliders(change) {
  const quantity = (name, label, min, max, step, is = (value) => value) =>
    slider({
      ...{ label, min, max, step, value: min },
      format: (value) => plain(is(value)),
      change: (value) => change({ [name]: is(value) }),
    });
  return {
    w: quantity("w", "start, w", W.from, W.to, 0.01),
    b: quantity("b", "start, b", B.from, B.to, 0.01),
    rate: quantity("rate", "learning rate", 0.005, 0.1, 0.005),
    momentum: quantity("momentum", "momentum", 0, 0.9, 0.1),
    bound: quantity("bound", "bound of the clip", -1, 1.8, 0.1, toBound),
  };
}

function walkBoth({ w, b, rate, momentum, bound, kind }, cell) {
  const lossAt = (parameters) => cellGradient(parameters, cell);
  const how = { steps: cell.walk, rate, momentum };
  const clip = (gradient) => CLIPS[kind](gradient, bound);
  return {
    unclipped: walk(lossAt, [w, b], how),
    clipped: walk(lossAt, [w, b], { ...how, clip }),
    cell: lossAt([w, b]),
  };
}

function pathMarks({ points }, shown, colour) {
  const seen = points.slice(0, shown + 1);
  const path = { x: seen.map(([w]) => w), y: seen.map(([, b]) => b), class: colour };
  return [
    { kind: "line", ...path },
    { kind: "points", ...path, radius: 2 },
  ];
}

function stepMarks(values, colour) {
  const steps = { x: values.map((_, i) => i + 1), y: values, class: colour };
  return [
    { kind: "line", ...steps },
    { kind: "points", ...steps, radius: 2 },
  ];
}

function cellMarks({ states, atStates }) {
  const t = Array.from(states, (_, i) => i);
  return [
    { kind: "line", x: t, y: Array.from(states, Math.abs), class: "gp-random" },
    { kind: "line", x: t, y: Array.from(atStates, Math.abs), class: "gp-unclipped" },
  ];
}

// From the shortest step but one in a million to the longest, within what a bound can be told from.
function lengthAxis(lengths) {
  const some = lengths.filter((length) => length > 0);
  const to = Math.min(Math.max(...some, 1e-3), 1e4);
  const from = Math.max(Math.min(...some, to / 10), 1e-6);
  return { from: 10 ** Math.floor(Math.log10(from)), to: 10 ** Math.ceil(Math.log10(to)) };
}

function facts(setting, { unclipped, clipped, cell: { states, atStates } }, cell, shown) {
  const told = (name, { lengths, angles, losses, finite }) => ({
    [`${name}Steps`]: lengths.length,
    [`${name}Finite`]: finite,
    [`${name}Loss`]: losses.at(-1),
    [`${name}Longest`]: Math.max(...lengths),
    [`${name}Angle`]: Math.max(...angles),
  });
  const factor = setting.w ** cell.steps;
  const last = { state: states.at(-1), gradient: atStates[0], factor, shown };
  return { ...setting, ...told("unclipped", unclipped), ...told("clipped", clipped), ...last };
}

const few = (value) => {
  const inText = value === 0 || (value >= 0.001 && value < 1e4);
  if (inText) return plain(Number(value.toPrecision(2)));
  const [digits, exponent] = value.toExponential(0).split("e");
  return `${digits}·${powerOfTen(10 ** Number(exponent))}`;
};

function sentence({ w, bound, kind }, { unclipped, clipped }, cell) {
  const end = ({ lengths, losses, finite }) => {
    const longest = few(Math.max(...lengths));
    return finite
      ? `${lengths.length} steps of at most ${longest} end at a loss of ${few(losses.at(-1))}`
      : `the loss overflows after ${lengths.length} steps, the longest ${longest}`;
  };
  const turn = Math.round(Math.max(...clipped.angles));
  const turned = turn === 0 ? "none is turned" : `they are turned by up to ${turn}°`;
  const bounded =
    kind === "none" ? "" : ` Clipped by ${kind} at ${plain(bound)}, ${end(clipped)}; ${turned}.`;
  const fate =
    w > 1 ? "above 1 it explodes" : w < 1 ? "below 1 it vanishes" : "at 1 it does neither";
  const back = `Each of the cell's ${cell.steps} steps multiplies a gradient by w = ${plain(w)}, together by ${few(w ** cell.steps)}: ${fate}.`;
  return `Unclipped, ${end(unclipped)}.${bounded} ${back}`;
}
