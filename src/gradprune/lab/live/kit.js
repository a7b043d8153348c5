// Which layers can Python name, when it hands over a network of several kinds?

import { attentionLayer } from "./attention.js";
import { convolutionLayer } from "./convolution.js";
import { denseLayer } from "./dense.js";
import { activationLayer, meanLayer, placeLayer } from "./elementwise.js";
import { recurrentLayer } from "./recurrent.js";

const KIT = {
  dense: denseLayer,
  activation: activationLayer,
  place: placeLayer,
  mean: meanLayer,
  convolution: convolutionLayer,
  recurrent: recurrentLayer,
  attention: attentionLayer,
};

/** Returns the layers of a list such as [["dense", 64, 10]]: a name, and what that layer takes. */
export function layersNamed(list) {
  return list.map(([name, ...shape]) => {
    if (Object.hasOwn(KIT, name)) return KIT[name](...shape);
    throw new RangeError(`a layer is one of ${Object.keys(KIT).join(", ")}; got ${name}`);
  });
}
