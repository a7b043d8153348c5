// How does a loss in two parameters look from above? A chart with the loss as shades under it, darker or lighter than the
// page as the loss grows, on which the reader may put a point.
import { createChart } from "./chart.js";

const ACROSS = 142;
const DOWN = 91;

// `height(x, y)` is what is shaded, in bands one unit apart from `low` to `high`; `pick(x, y)` is called where the reader
// presses or drags. The same chart as createChart's otherwise.
export function createHeat({ height, low, high, pick, ...options }) {
  const chart = createChart(options);
  const { svg, box, x, y } = chart;
  const canvas = shaded(box, (across, down) => {
    const found = height(x.from + across * (x.to - x.from), y.to - down * (y.to - y.from));
    return Math.min(Math.max((Math.floor(found) - low) / (high - low), 0), 1);
  });
  const layers = document.createElement("div");
  layers.className = "gp-live-layers";
  svg.replaceWith(layers);
  layers.append(canvas, svg);

  const put = (event) => {
    const seen = svg.getBoundingClientRect();
    const scale = box.width / seen.width;
    const across = ((event.clientX - seen.left) * scale - box.left) / (box.right - box.left);
    const down = ((event.clientY - seen.top) * scale - box.top) / (box.bottom - box.top);
    const within = (share) => Math.min(Math.max(share, 0), 1);
    pick(x.from + within(across) * (x.to - x.from), y.to - within(down) * (y.to - y.from));
  };
  svg.addEventListener("pointerdown", (event) => {
    svg.setPointerCapture(event.pointerId);
    put(event);
  });
  svg.addEventListener("pointermove", (event) => {
    if (svg.hasPointerCapture(event.pointerId)) put(event);
  });
  return chart;
}

// A grey of `share(across, down)`, both from 0 to 1, lies over the page: it darkens a light one and lightens a dark one.
function shaded(box, share) {
  const canvas = document.createElement("canvas");
  canvas.width = ACROSS;
  canvas.height = DOWN;
  canvas.className = "gp-live-heat";
  canvas.setAttribute("aria-hidden", "true");
  canvas.style.left = `${(100 * box.left) / box.width}%`;
  canvas.style.top = `${(100 * box.top) / box.height}%`;
  canvas.style.width = `${(100 * (box.right - box.left)) / box.width}%`;
  canvas.style.height = `${(100 * (box.bottom - box.top)) / box.height}%`;
  const context = canvas.getContext("2d");
  const image = context.createImageData(ACROSS, DOWN);
  for (let i = 0; i < ACROSS * DOWN; i++) {
    const across = ((i % ACROSS) + 0.5) / ACROSS;
    const down = (Math.floor(i / ACROSS) + 0.5) / DOWN;
    image.data.set([128, 128, 128, Math.round(215 * share(across, down))], 4 * i);
  }
  context.putImageData(image, 0, 0);
  return canvas;
}
