// Chapter 2: put a start on a loss with a wall, and see where gradient descent goes with a bound and without.
import { createChart, plain, scientific } from "./chart.js";
import { button, choice, slider } from "./controls.js";
import { clipByNorm, clipByValue } from "./gradients.js";
import { createHeat } from "./heat.js";
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
import { cellGradient, cellLoss } from "./unroll.js";
import { walk } from "./walk.js";

const W = { from: 0.2, to: 1.4 };
const B = { from: -1, to: 1 };
const FRAMES = 4; // a step, when the walk is played
const LEGEND = [
  ["no bound", "gp-unclipped"],
  ["with the bound", "gp-clipped"],
];
const WORDS = [
  { kind: "word", x: 0.45, y: 0.72, text: "plain" },
  { kind: "word", x: 1.3, y: 0.72, text: "wall" },
];
const CLIPS = { norm: clipByNorm, value: clipByValue };
const SEEN = { from: 1e-6, to: 1e8 }; // of losses and lengths, what a picture can tell apart
const fromPower = (power) => Number((10 ** power).toPrecision(2));
const round = (value) => Number(value.toFixed(2));

export function render({ model, el }) {
  const cell = model.get("_cell"); // { steps, first, target, walk }
  const first = model.get("_start");
  const names = Object.keys(first);
  const chosen = () => settingsOf(model, names);
  let shown = cell.walk; // of each walk's steps
  let both = null; // the walks of the setting

  const stage = createStage(el, "clip", "Gradient descent at a wall, with and without a bound");
  const controls = createControls((change) => publish(model, change));
  const play = button("Play", () => {
    if (player.isRunning()) return rest();
    shown = 0;
    frames = 0;
    player.start();
    request();
  });
  const reset = button("Reset", () => {
    publish(model, first);
    ask();
  });
  const buttons = element("div", { class: "gp-live-buttons" }, play, " ", reset);
  stage.controls.append(...controls.roots, buttons);

  const panels = createPanels(cell, (w, b) => publish(model, { w: round(w), b: round(b) }));
  stage.panels.append(...Object.values(panels).map(({ root }) => root));

  const draw = () => {
    const setting = chosen();
    drawPanels(panels, setting, both, shown);
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
    done: () => rest(),
  });
  function rest() {
    player.stop();
    shown = cell.walk;
    request();
  }

  function follow() {
    const setting = chosen();
    both = walkBoth(setting, cell);
    controls.set(setting);
    rest();
  }
  const ask = listen(stage, model, names, follow);
  stage.ends.push(() => player.stop());
  follow();
  stage.root.numbers = () => both;
  return closing(stage);
}

function createControls(change) {
  const same = (value) => value;
  const quantity = (name, label, min, max, step, is = same, from = same) => [
    name,
    slider({
      ...{ label, min, max, step, value: min },
      format: (value) => plain(is(value)),
      change: (value) => change({ [name]: is(value) }),
    }),
    from,
  ];
  const quantities = [
    quantity("w", "weight w at the start", W.from, W.to, 0.01),
    quantity("b", "bias b at the start", B.from, B.to, 0.01),
    quantity("rate", "learning rate", -6, -1, 0.1, fromPower, Math.log10),
    quantity("momentum", "momentum", 0, 0.9, 0.1),
    quantity("bound", "size of the bound", -1, 1.8, 0.1, fromPower, Math.log10),
  ];
  const kind = choice({
    label: "Bounded:",
    options: [
      ["norm", "the norm"],
      ["value", "each entry"],
    ],
    value: "norm",
    change: (is) => change({ kind: is }),
  });
  const set = (setting) => {
    for (const [name, control, from] of quantities) control.set(from(setting[name]));
    kind.set(setting.kind);
  };
  return { roots: [...quantities.map(([, { root }]) => root), kind.root], set };
}

function createPanels(cell, pick) {
  const x = { label: "step of descent", from: 0, to: cell.walk };
  return {
    map: createHeat({
      title: "The loss from above: press to start there",
      legend: LEGEND,
      x: { label: "weight w (the greyer, the higher the loss)", ...W },
      y: { label: "bias b", ...B },
      height: (w, b) => 2 * Math.log10(cellLoss([w, b], cell)), // two bands a power of ten
      ...{ low: -6, high: 13, pick },
    }),
    losses: createChart({
      title: "The loss on the way",
      legend: LEGEND,
      x,
      y: { label: "loss", log: true },
    }),
    lengths: createChart({
      title: "How long is each step?",
      legend: LEGEND,
      x,
      y: { label: "length", log: true },
    }),
    angles: createChart({
      title: "How far is each step turned off the steepest way?",
      legend: LEGEND,
      x,
      y: { label: "degrees", from: 0, to: 180, ticks: [0, 45, 90, 135, 180] },
    }),
  };
}

function drawPanels({ map, losses, lengths, angles }, { w, b }, { unclipped, clipped }, shown) {
  const walks = [
    [unclipped, "gp-unclipped"],
    [clipped, "gp-clipped"],
  ];
  const paths = walks.flatMap(([taken, colour]) => pathMarks(taken, shown, colour));
  map.draw([...WORDS, ...paths, { kind: "points", x: [w], y: [b], radius: 5 }]);
  const marks = (name, from) =>
    walks.flatMap(([taken, colour]) =>
      stepMarks(taken[name].slice(0, shown + 1 - from), from, colour),
    );
  const axis = (name) => ({ y: logAxis(walks.flatMap(([taken]) => taken[name])) });
  losses.draw(marks("losses", 0).map(onLogAxis), axis("losses"));
  lengths.draw(marks("lengths", 1).map(onLogAxis), axis("lengths"));
  angles.draw(marks("angles", 1));
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
  const seen = points.slice(0, shown + 1).map(nearMap);
  const path = { x: seen.map(([w]) => w), y: seen.map(([, b]) => b), class: colour };
  return [
    { kind: "line", ...path },
    { kind: "points", ...path, radius: 2 },
  ];
}

// A point off the map stands just outside it, in its direction from the middle: nothing is drawn far off the page.
function nearMap([w, b]) {
  const middle = (W.from + W.to) / 2;
  const shrink = Math.min(1, 1.3 / Math.hypot(w - middle, b));
  return [middle + shrink * (w - middle), shrink * b];
}

function stepMarks(y, from, colour) {
  const steps = { x: y.map((_, i) => i + from), y, class: colour };
  return [
    { kind: "line", ...steps },
    { kind: "points", ...steps, radius: 2 },
  ];
}

// What a picture cannot tell apart stands just off the axis.
const onLogAxis = (mark) => ({
  ...mark,
  y: mark.y.map((value) => Math.min(Math.max(value, SEEN.from / 2), SEEN.to * 2)),
});

function logAxis(values) {
  const some = values.filter((value) => value > 0);
  const to = Math.min(Math.max(...some, 1e-3), SEEN.to);
  const from = Math.max(Math.min(...some, to / 10), SEEN.from);
  return { from: 10 ** Math.floor(Math.log10(from)), to: 10 ** Math.ceil(Math.log10(to)) };
}

function facts(setting, { unclipped, clipped }, cell, shown) {
  const told = (name, { lengths, angles, losses, finite }) => ({
    [`${name}Steps`]: lengths.length,
    [`${name}Finite`]: finite,
    [`${name}Loss`]: losses.at(-1),
    [`${name}Longest`]: Math.max(...lengths),
    [`${name}Angle`]: Math.max(...angles),
  });
  const factor = setting.w ** cell.steps;
  return {
    ...setting,
    ...told("unclipped", unclipped),
    ...told("clipped", clipped),
    factor,
    shown,
  };
}

const few = (value) => {
  const inText = value === 0 || (value >= 0.001 && value < 1e4);
  if (inText) return plain(Number(value.toPrecision(2)));
  return scientific(value);
};

function sentence({ w, bound, kind }, { unclipped, clipped }, cell) {
  const end = ({ lengths, losses, finite }) => {
    const longest = few(Math.max(...lengths));
    return finite
      ? `${lengths.length} steps, the longest ${longest}, end at a loss of ${few(losses.at(-1))}`
      : `the loss is too large for a number after ${lengths.length} steps, the longest ${longest}`;
  };
  const turn = Math.round(Math.max(...clipped.angles));
  const turned = turn === 0 ? "" : `; they are turned by up to ${turn}°`;
  const bounded = kind === "norm" ? "With a bound of" : "With each entry at most";
  const fate =
    w > 1 ? "above 1 it explodes" : w < 1 ? "below 1 it vanishes" : "at 1 it does neither";
  const back = `At the start each of the cell's ${cell.steps} steps multiplies a gradient by w = ${plain(w)}, together by ${few(w ** cell.steps)}: ${fate}.`;
  return `Without a bound, ${end(unclipped)}. ${bounded} ${plain(bound)}, ${end(clipped)}${turned}. ${back}`;
}
