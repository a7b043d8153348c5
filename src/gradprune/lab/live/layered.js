// What does a network of layers of several kinds answer, and how does its loss depend on each
// parameter?
//
// A layer is { from, to, parameters, room, forward, backward }: it takes `from` numbers of an example
// to `to`. `parameters` are pairs of "weights" (which pruning may take) or "biases" (all others) and
// how many, in torch's order; `room(rows)` is the memory it keeps between its passes, to which `out`
// is added; `forward` writes `out`, and `backward` the gradients of its parameters and, unless it is
// null, `below`, that of its inputs. All numbers are of double precision. Twin: torch, by tests.

/** Returns the network of these layers whose parameters are `numbers`, in torch's order. */
export function createLayered(layers, numbers) {
  layers.slice(1).forEach(({ from }, l) => {
    if (from !== layers[l].to)
      throw new RangeError(
        `layer ${l + 1} takes ${from} numbers, layer ${l} gives ${layers[l].to}`,
      );
  });
  const wanted = countParameters(layers);
  if (numbers.length !== wanted)
    throw new RangeError(`the layers take ${wanted} parameters, got ${numbers.length}`);
  const sizes = [layers[0].from, layers.at(-1).to];
  return { layers, sizes, ...arranged(layers, numbers) };
}

/** Returns a network of its own memory with the same parameters. */
export function copyLayered(net) {
  return createLayered(net.layers, flattenLayered(net));
}

/** Returns all parameters in torch's order. */
export function flattenLayered({ layers, parameters }) {
  const numbers = new Float64Array(countParameters(layers));
  let start = 0;
  for (const array of parameters.flat()) {
    numbers.set(array, start);
    start += array.length;
  }
  return numbers;
}

/** Returns the memory for passes of up to `rows` rows. */
function createLayeredWorkspace({ layers }, rows) {
  const gradients = arranged(layers, new Float64Array(countParameters(layers)));
  return {
    rows,
    rooms: layers.map((layer) => ({ ...layer.room(rows), out: new Float64Array(rows * layer.to) })),
    deltas: layers.map(({ to }) => new Float64Array(rows * to)),
    gradients: { ...gradients, all: gradients.parameters.flat() },
  };
}

/** Returns the logits, rows x out: a view of the workspace, good until the next pass. */
function forwardLayered(net, inputs, rows, work) {
  if (rows > work.rows) throw new RangeError(`the workspace has ${work.rows} rows, got ${rows}`);
  const wanted = rows * net.sizes[0];
  if (inputs.length < wanted)
    throw new RangeError(`${rows} rows take ${wanted} inputs, got ${inputs.length}`);
  let given = inputs;
  net.layers.forEach((layer, l) => {
    layer.forward(net.parameters[l], given, rows, work.rooms[l]);
    given = work.rooms[l].out;
  });
  return given.subarray(0, rows * net.sizes[1]);
}

/**
 * Returns the gradients { weights, biases, all } of a loss whose gradient at the logits is given;
 * `forward` was called last with the same inputs.
 */
function backwardLayered(net, inputs, rows, work, gradient) {
  const { deltas, rooms, gradients } = work;
  deltas.at(-1).set(gradient.subarray(0, rows * net.sizes[1]));
  for (let l = net.layers.length - 1; l >= 0; l--) {
    const given = l === 0 ? inputs : rooms[l - 1].out;
    const below = l === 0 ? null : deltas[l - 1];
    const [own, changes] = [net.parameters[l], gradients.parameters[l]];
    net.layers[l].backward(own, given, rows, rooms[l], deltas[l], changes, below);
  }
  return gradients;
}

/** What training.js and reading.js need to know of such networks; network.js has that of its own. */
export const LAYERED = {
  createWorkspace: createLayeredWorkspace,
  forward: forwardLayered,
  backward: backwardLayered,
};

function countParameters(layers) {
  return layers.flatMap(({ parameters }) => parameters).reduce((sum, [, size]) => sum + size, 0);
}

/** Numbers as each layer's arrays, and the same arrays by what they are. */
function arranged(layers, numbers) {
  const found = { parameters: [], weights: [], biases: [] };
  let start = 0;
  for (const { parameters } of layers) {
    found.parameters.push(
      parameters.map(([kind, size]) => {
        const array = Float64Array.from(numbers.subarray(start, start + size));
        start += size;
        found[kind].push(array);
        return array;
      }),
    );
  }
  return found;
}
