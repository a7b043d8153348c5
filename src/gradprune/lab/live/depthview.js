// How are the layers of a deep network drawn: the gradient of each, how far it has moved, and the loss of all?
import { createChart } from "./chart.js";
import { layersIn } from "./depthwords.js";

const FLOOR = 1e-45; // below it single precision has no number but 0
const BELOW = 1e-60; // where a point is put that stands below every axis
const NO_NUMBER = "no number any more";
// The axes reach a little beyond the last layer and the gradients.
const ENDS = [7, 12, 22, 32, 42, 62];
const FLOORS = [1e-4, 1e-8, 1e-16, 1e-24];
const CEILINGS = [10, 1e4, 1e8, 1e16];

export function createDepthCharts(steps) {
  const layers = { label: "layer, first to last", from: 0, to: ENDS.at(-1) };
  return {
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
      x: { label: "training step", from: 0, to: steps },
      y: { label: "loss", from: 0, to: 3 },
    }),
  };
}

const word = (text, x, y) => ({ kind: "word", x, y, text });
const isDrawable = (value) => value > 0 && Number.isFinite(value);
const placesOf = (values) => values.map((_, i) => i + 1);
const layerAxis = (count) => ({ to: ENDS.find((end) => end > count) });

// The gradient's norm at each layer, and by formula.
export function drawGradient(chart, norms, predicted) {
  const x = layerAxis(norms.length);
  const finite = [...norms.filter(Number.isFinite), ...predicted];
  const [lowest, highest] = [Math.min(...finite), Math.max(...finite)];
  const y = {
    from: FLOORS.find((floor) => lowest > floor) ?? 1e-46, // single precision's last few are there
    to: CEILINGS.find((ceiling) => highest < ceiling) ?? 1e38,
  };
  const at = placesOf(norms);
  const inside = norms.map((norm) => (norm > FLOOR && Number.isFinite(norm) ? norm : BELOW));
  const height = (share) => y.from * (y.to / y.from) ** share;
  const lost = norms.filter((norm) => norm <= FLOOR).length;
  const beyond = norms.filter((norm) => !Number.isFinite(norm)).length;
  const marks = [
    { kind: "line", x: at, y: predicted, class: "gp-predicted gp-live-dashed" },
    { kind: "points", x: at, y: inside, radius: 2, class: "gp-dense" },
  ];
  // Where the first layers have lost their points, the others rise to the right of these words.
  if (lost) {
    marks.push(word(`${layersIn(lost)} below the`, 0.27 * x.to, height(0.72)));
    marks.push(word("smallest number", 0.27 * x.to, height(0.63)));
  }
  if (beyond) {
    const words = `${layersIn(beyond)} beyond the largest number`;
    marks.push(word(words, 0.5 * x.to, height(0.92)));
  }
  chart.draw(marks, { x, y });
}

// How far each layer has moved after so many steps, as a share of its norm.
export function drawMoved(chart, moved, steps, broken) {
  const x = layerAxis(moved.length);
  const y = moved.map((value) => (isDrawable(value) ? value : Number.NaN));
  const still = moved.filter((value) => value === 0).length;
  const marks = [{ kind: "line", x: placesOf(moved), y, class: "gp-corrected" }];
  if (steps === 0) marks.push(word("press Train", 0.5 * x.to, 1e-4));
  else if (still) marks.push(word(`not moved: ${layersIn(still)}`, 0.27 * x.to, 1e-2));
  if (broken) marks.push(word(NO_NUMBER, 0.5 * x.to, 1e-4));
  chart.draw(marks, { x });
}

// The loss after each step, above what guessing among `classes` costs.
export function drawLoss(chart, losses, classes, broken) {
  const marks = [
    { kind: "rule", y: Math.log(classes), class: "gp-random", text: "guessing" },
    { kind: "line", x: placesOf(losses), y: losses, class: "gp-dense" },
  ];
  const middle = chart.x.to / 2;
  if (losses.length === 0) marks.push(word("press Train", middle, 1));
  if (broken) marks.push(word(NO_NUMBER, middle, 1));
  chart.draw(marks);
}
