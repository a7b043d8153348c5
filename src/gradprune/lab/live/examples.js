// How does the page read what Python packed: a network, and examples?
import { createNetwork } from "./network.js";

// anywidget hands bytes over as a DataView of any offset; a copy is aligned.
const bytes = (view) => new Uint8Array(view.buffer, view.byteOffset, view.byteLength).slice();
export const readFloats = (view) => new Float32Array(bytes(view).buffer);
export const readBytes = bytes;

// Twin of figure.py's pack_network.
export const readNetwork = ({ sizes, activation, numbers }) =>
  createNetwork(sizes, activation, readFloats(numbers));

// Twin of figure.py's pack_split: { inputs, labels, rows }.
export function readSplit({ rows, labels, levels, codes, values }) {
  const inputs = values
    ? readFloats(values)
    : Float32Array.from(
        bytes(codes),
        (
          (table) => (code) =>
            table[code]
        )(readFloats(levels)),
      );
  return { inputs, labels: bytes(labels), rows };
}
