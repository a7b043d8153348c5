// How does a layer of weights look? Each output unit as a small picture of its inputs: blue for positive, orange for
// negative, nothing where the weight is gone.
import { element } from "./stage.js";

const BLUE = [0, 119, 187];
const ORANGE = [204, 85, 0];

// `tile`: [columns, rows] of one unit's inputs; `columns`: units beside each other.
export function createPixels({ label, units, columns, tile: [across, down] }) {
  const rows = Math.ceil(units / columns);
  const canvas = document.createElement("canvas");
  canvas.width = columns * (across + 1) - 1;
  canvas.height = rows * (down + 1) - 1;
  canvas.className = "gp-live-pixels";
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", label);
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  const size = across * down;
  // `strongest` is the magnitude that is drawn in full colour; `mask` has a 1 for each weight that stays.
  const draw = (weights, mask, strongest) => {
    for (let unit = 0; unit < units; unit++) {
      const left = (unit % columns) * (across + 1);
      const top = Math.floor(unit / columns) * (down + 1);
      for (let i = 0; i < size; i++) {
        const from = unit * size + i;
        const at = 4 * ((top + Math.floor(i / across)) * canvas.width + left + (i % across));
        const weight = weights[from];
        image.data.set(weight < 0 ? ORANGE : BLUE, at);
        const shown = mask && !mask[from] ? 0 : Math.min(1, 0.08 + Math.abs(weight) / strongest);
        image.data[at + 3] = Math.round(255 * shown);
      }
    }
    context.putImageData(image, 0, 0);
  };
  return { root: canvas, draw };
}

// The first layer of a network that reads digits, with its title; with more `columns` as wide as all panels.
export function createPicture(title, units, columns = 8) {
  const { root, draw } = createPixels({ label: title, units, columns, tile: [8, 8] });
  const caption = element("figcaption", {}, title);
  const wide = columns > 8 ? " gp-live-wide" : "";
  return { root: element("figure", { class: `gp-live-chart${wide}` }, caption, root), draw };
}
