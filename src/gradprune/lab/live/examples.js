// How does the page read what Python packed: a network, and examples?
import { createNetwork } from "./network.js";

// anywidget hands bytes over as a DataView of any offset; a copy is aligned.
const bytes = (view) => new Uint8Array(view.buffer, view.byteOffset, view.byteLength).slice();
export const readFloats = (view) => new Float32Array(bytes(view).buffer);

// Numbers of half precision (IEEE 754), which only the newest browsers know; exactly. Twin of figure.py's halves.
export function readHalves(view) {
  return Float64Array.from(new Uint16Array(bytes(view).buffer), (code) => {
    const sign = code & 0x8000 ? -1 : 1;
    const [exponent, fraction] = [(code >> 10) & 31, code & 1023];
    if (exponent === 31) throw new RangeError("a number of half precision is infinite or NaN");
    return (
      sign * (exponent === 0 ? fraction / 2 ** 24 : (1 + fraction / 1024) * 2 ** (exponent - 15))
    );
  });
}

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
