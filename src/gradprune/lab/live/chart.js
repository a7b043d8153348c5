// How are numbers drawn? Axes, lines, bars and rules as SVG in the page's own ink, so that light, dark and print need
// nothing done. A chart is redrawn as a whole each frame: a few path strings.
const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { left: 54, right: 12, top: 10, bottom: 38 };
const EDGE = 5; // how far a mark may stand out of the axes: the radius of a dot

const svgElement = (tag, attributes, text) => {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
};

// Round numbers from `from` to `to`, about `count` of them: 1, 2 or 5 times a power of ten apart.
export function ticks(from, to, count = 5) {
  const rough = (to - from) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((times) => times * power >= rough * 0.999);
  const first = Math.ceil(from / step - 1e-9);
  const last = Math.floor(to / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
}

// Powers of ten from `from` to `to`, at most about `count` of them.
export function powers(from, to, count = 5) {
  const first = Math.ceil(Math.log10(from) - 1e-9);
  const last = Math.floor(Math.log10(to) + 1e-9);
  const stride = Math.max(1, Math.ceil((last - first + 1) / count));
  const exponents = Array.from({ length: Math.max(0, last - first + 1) }, (_, i) => first + i);
  return exponents.filter((e) => (e - first) % stride === 0).map((e) => 10 ** e);
}

const SUPERSCRIPTS = {
  "-": "⁻",
  0: "⁰",
  1: "¹",
  2: "²",
  3: "³",
  4: "⁴",
  5: "⁵",
  6: "⁶",
  7: "⁷",
  8: "⁸",
  9: "⁹",
};
export const powerOfTen = (value) =>
  `10${[...String(Math.round(Math.log10(value)))].map((digit) => SUPERSCRIPTS[digit]).join("")}`;
// 3e-13 as 3·10⁻¹³.
export const scientific = (value) => {
  const [digit, exponent] = value.toExponential(0).split("e");
  return `${digit}·${powerOfTen(10 ** Number(exponent))}`;
};
export const plain = (value) => String(Number(value.toPrecision(6)));

// From a value to its place on a linear or logarithmic axis, { from, to, log }, which is drawn from `start` to `end`.
export const placeOn = ({ from, to, log }, start, end) => {
  const [a, b] = log ? [Math.log10(from), Math.log10(to)] : [from, to];
  const clamp = (value) => Math.min(Math.max(value, -1e4), 1e4);
  return (value) =>
    start +
    clamp(((log ? Math.log10(Math.max(value, 1e-300)) : value) - a) / (b - a)) * (end - start);
};

// `draw(marks, axes)` takes marks in the order they lie on each other:
//   { kind: "line", x, y, class }                      arrays of numbers; NaN breaks the line
//   { kind: "points", x, y, radius, class }            arrays of numbers; the radius is 4 unless given
//   { kind: "bars", x, y, base, width, class }         one bar an entry, from `base` (0) up to y
//   { kind: "rule", x | y, class, text }               a line across, with a word at its end
//   { kind: "word", x, y, class, text }                a word in the middle of a place
// `title` stands over the chart, and under it `legend`: pairs of a word and the class that has its colour. What
// the chart shows in words is the figure's sentence. What runs off the axes is cut off.
export function createChart(options) {
  const { title, x, y, legend = [], width = 340, height = 230 } = options;
  const figure = document.createElement("figure");
  figure.className = "gp-live-chart";
  const caption = document.createElement("figcaption");
  caption.textContent = title;
  for (const [word, name] of legend) {
    const key = document.createElement("span");
    key.className = `gp-live-key ${name}`;
    key.textContent = word;
    caption.append(" ", key);
  }
  const svg = svgElement("svg", {
    viewBox: `0 0 ${width} ${height}`,
    role: "img",
    "aria-label": title,
  });
  const box = {
    left: MARGIN.left,
    right: width - MARGIN.right,
    top: MARGIN.top,
    bottom: height - MARGIN.bottom,
    width,
    height,
  };
  const inner = [box.left - EDGE, box.top - EDGE];
  const extent = [box.right - box.left + 2 * EDGE, box.bottom - box.top + 2 * EDGE];
  const marks = svgElement("svg", {
    ...{ x: inner[0], y: inner[1], width: extent[0], height: extent[1] },
    viewBox: [...inner, ...extent].join(" "),
  });
  const frame = svgElement("g", {});
  svg.append(frame, marks);
  figure.append(caption, svg);
  let drawnAxes = "";
  const draw = (list, axes = {}) => {
    const across = { ...x, ...axes.x };
    const up = { ...y, ...axes.y };
    const toX = placeOn(across, box.left, box.right);
    const toY = placeOn(up, box.bottom, box.top);
    const key = JSON.stringify([across, up]);
    if (key !== drawnAxes) {
      frame.replaceChildren(...axisElements(across, up, toX, toY, box));
      drawnAxes = key;
    }
    marks.replaceChildren(...list.flatMap((mark) => markElements(mark, toX, toY, box)));
  };
  const name = (words) => svg.setAttribute("aria-label", words);
  return { root: figure, draw, name, svg, box, x, y };
}

function axisElements(across, up, toX, toY, box) {
  const made = [];
  const labels = (axis) =>
    axis.ticks ?? (axis.log ? powers(axis.from, axis.to) : ticks(axis.from, axis.to));
  const write = (axis) => axis.format ?? (axis.log ? powerOfTen : plain);
  for (const value of labels(across)) {
    const at = toX(value);
    made.push(
      svgElement("line", { x1: at, x2: at, y1: box.top, y2: box.bottom, class: "gp-live-grid" }),
    );
    made.push(
      svgElement(
        "text",
        { x: at, y: box.bottom + 15, "text-anchor": "middle" },
        write(across)(value),
      ),
    );
  }
  for (const value of labels(up)) {
    const at = toY(value);
    made.push(
      svgElement("line", { x1: box.left, x2: box.right, y1: at, y2: at, class: "gp-live-grid" }),
    );
    made.push(
      svgElement("text", { x: box.left - 5, y: at + 4, "text-anchor": "end" }, write(up)(value)),
    );
  }
  const middle = (box.left + box.right) / 2;
  made.push(
    svgElement(
      "text",
      { x: middle, y: box.bottom + 33, "text-anchor": "middle" },
      across.label ?? "",
    ),
  );
  const turned = `rotate(-90) translate(${-(box.top + box.bottom) / 2} 11)`;
  made.push(svgElement("text", { transform: turned, "text-anchor": "middle" }, up.label ?? ""));
  return made;
}

function markElements(mark, toX, toY, box) {
  const common = { class: `gp-live-${mark.kind} ${mark.class ?? ""}` };
  if (mark.kind === "line") return [svgElement("path", { ...common, d: linePath(mark, toX, toY) })];
  if (mark.kind === "points") {
    const r = mark.radius ?? 4;
    return Array.from(mark.x, (value, i) =>
      svgElement("circle", { ...common, cx: toX(value), cy: toY(mark.y[i]), r }),
    );
  }
  if (mark.kind === "bars")
    return [svgElement("path", { ...common, d: barsPath(mark, toX, toY, box) })];
  if (mark.kind === "word") {
    const place = { x: toX(mark.x), y: toY(mark.y), "text-anchor": "middle" };
    return [svgElement("text", { ...common, ...place }, mark.text)];
  }
  const upright = mark.x !== undefined;
  const at = upright ? toX(mark.x) : toY(mark.y);
  const ends = upright
    ? { x1: at, x2: at, y1: box.top, y2: box.bottom }
    : { x1: box.left, x2: box.right, y1: at, y2: at };
  const made = [svgElement("line", { ...common, ...ends })];
  if (mark.text) {
    const right = upright ? at > (box.left + box.right) / 2 : true;
    const place = upright
      ? { x: at + (right ? -4 : 4), y: box.top + 10 }
      : { x: box.right, y: at - 4 };
    made.push(
      svgElement(
        "text",
        { ...place, "text-anchor": right ? "end" : "start", class: mark.class ?? "" },
        mark.text,
      ),
    );
  }
  return made;
}

function linePath({ x, y }, toX, toY) {
  let path = "";
  let pen = "M";
  for (let i = 0; i < x.length; i++) {
    if (Number.isNaN(y[i])) {
      pen = "M";
      continue;
    }
    path += `${pen}${toX(x[i]).toFixed(1)} ${toY(y[i]).toFixed(1)}`;
    pen = "L";
  }
  return path;
}

function barsPath({ x, y, base, width }, toX, toY, box) {
  let path = "";
  for (let i = 0; i < x.length; i++) {
    const from = Math.min(toY(base ? base[i] : 0), box.bottom);
    const left = toX(x[i] - width / 2);
    path += `M${left.toFixed(1)} ${from.toFixed(1)}V${toY(y[i]).toFixed(1)}H${toX(x[i] + width / 2).toFixed(1)}V${from.toFixed(1)}Z`;
  }
  return path;
}
