// How does a reader show the network a digit: pick one that it has not seen, or draw one?
import { element } from "./stage.js";

const SIDE = 8; // of the picture that the network sees
const FINE = 4; // bits a pixel, along each side: a pixel's ink is how many of its 16 bits are black
const BRUSH = 2.1; // radius of a stroke, in bits

// `examples` has one input a digit; `levels[ink]` is the network's input for that ink (0 to 16).
// `change` is called when another picture is there.
export function createPad({ examples, levels, change }) {
  const canvas = element("canvas", {
    width: SIDE,
    height: SIDE,
    class: "gp-live-pad",
    role: "img",
  });
  const context = canvas.getContext("2d");
  const image = context.createImageData(SIDE, SIDE);
  const bits = new Uint8Array((SIDE * FINE) ** 2);
  const shown = new Float32Array(SIDE * SIDE);

  let digit = null; // the one that was picked; null where the reader draws
  const show = (inputs, words, picked = null) => {
    digit = picked;
    buttons.forEach((press, i) => {
      press.setAttribute("aria-pressed", String(i === picked));
    });
    shown.set(inputs);
    const span = levels.at(-1) - levels[0];
    shown.forEach((value, i) => {
      image.data[4 * i + 3] = Math.round((255 * (value - levels[0])) / span);
    });
    context.putImageData(image, 0, 0);
    canvas.setAttribute("aria-label", words);
    change();
  };
  const pick = (picked) =>
    show(examples[picked], `a ${picked} from the test digits, 8 by 8 pixels`, picked);
  const clear = () => {
    bits.fill(0);
    show(inkOf(bits, levels), "an empty pad, 8 by 8 pixels");
  };

  // Strokes are made of bits; the network sees how many there are in each pixel, as in its training data.
  let last = null;
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    const scale = (SIDE * FINE) / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  };
  const stroke = ([x, y]) => {
    const [fromX, fromY] = last ?? [x, y];
    const steps = Math.ceil(Math.hypot(x - fromX, y - fromY)) + 1;
    for (let i = 1; i <= steps; i++) {
      blacken(bits, fromX + ((x - fromX) * i) / steps, fromY + ((y - fromY) * i) / steps);
    }
    last = [x, y];
    show(inkOf(bits, levels), "what you drew, 8 by 8 pixels");
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    if (digit !== null) bits.fill(0); // else the stroke joins those that are there
    last = null;
    stroke(place(event));
  });
  canvas.addEventListener("pointermove", (event) => {
    if (canvas.hasPointerCapture(event.pointerId)) stroke(place(event));
  });

  const buttons = examples.map((_, i) => {
    const attributes = { type: "button", "aria-label": `show a ${i}`, "aria-pressed": "false" };
    const press = element("button", attributes, String(i));
    press.addEventListener("click", () => pick(i));
    return press;
  });
  const empty = element("button", { type: "button" }, "Clear");
  empty.addEventListener("click", clear);
  const caption = element(
    "figcaption",
    {},
    "Pick a digit, or draw one, in as many strokes as it takes",
  );
  const row = element("div", { class: "gp-live-picks" }, ...buttons, empty);
  const root = element("figure", { class: "gp-live-chart" }, caption, row, canvas);
  return { root, pick, input: () => shown, digit: () => digit };
}

function blacken(bits, x, y) {
  const side = SIDE * FINE;
  for (let row = Math.floor(y - BRUSH); row <= y + BRUSH; row++) {
    for (let column = Math.floor(x - BRUSH); column <= x + BRUSH; column++) {
      const inside = row >= 0 && row < side && column >= 0 && column < side;
      const near = Math.hypot(column + 0.5 - x, row + 0.5 - y) <= BRUSH;
      if (inside && near) bits[row * side + column] = 1;
    }
  }
}

function inkOf(bits, levels) {
  const ink = new Uint8Array(SIDE * SIDE);
  bits.forEach((bit, i) => {
    const row = Math.floor(i / (SIDE * FINE) / FINE);
    const column = Math.floor((i % (SIDE * FINE)) / FINE);
    ink[row * SIDE + column] += bit;
  });
  return Float32Array.from(ink, (count) => levels[count]);
}
