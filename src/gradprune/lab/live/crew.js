// How do several workers train one network: in step, averaged now and then, or each as it comes to shared weights?
//
// A worker has a network, an optimizer and masks of its own, and sees its part of each batch. Asynchronous workers share
// one network's memory. Twin: gradprune.lab.live.crew.

import { createFeedback, topFraction } from "./gradients.js";
import { copyNetwork } from "./network.js";
import { applyMasks, magnitudeScores, pruneMasks } from "./rank.js";
import { countAll } from "./reading.js";
import { createTraining, nextGradients, takeStep } from "./training.js";

/** Who takes each step together, and whether all are averaged now and then. */
export const WAYS = {
  synchronous: { groups: [[0, 1, 2, 3]], averaged: false },
  local: { groups: [[0], [1], [2], [3]], averaged: true },
  pairs: {
    groups: [
      [0, 1],
      [2, 3],
    ],
    averaged: true,
  },
  asynchronous: { groups: [], averaged: false },
};
export const WORKERS = 4;

/**
 * Returns four workers before their first step. `way` is one of WAYS; `period`, how many steps lie between two averages;
 * `age`, how many steps old the weights are at which an asynchronous worker computes its gradient; `density`, the share
 * of the entries that is sent, the others wait. The rest is what `createTraining` takes. Asynchronous workers, which each
 * take a step, step at a quarter of the rate.
 */
export function createCrew({ net, way, period, age, density, optimizer, ...options }) {
  if (!Object.hasOwn(WAYS, way)) {
    throw new RangeError(`way must be one of ${Object.keys(WAYS).join(", ")}; got ${way}`);
  }
  if (!(Number.isInteger(period) && period > 0)) {
    throw new RangeError(`period must be a whole number of at least 1, got ${period}`);
  }
  if (!(Number.isInteger(age) && age >= 0)) {
    throw new RangeError(`age must be a whole number of at least 0, got ${age}`);
  }
  const shared = way === "asynchronous";
  const memory = copyNetwork(net);
  const rate = shared ? optimizer.rate / WORKERS : optimizer.rate;
  const workers = Array.from({ length: WORKERS }, (_, p) => {
    const own = shared ? memory : copyNetwork(net);
    const training = createTraining({
      ...{ ...options, net: own, part: [p, WORKERS], optimizer: { ...optimizer, rate } },
    });
    const known = arraysOf(copyNetwork(net)); // what the others last heard of its weights
    return { net: own, training, masks: null, known, waiting: null, late: null };
  });
  // The shared weights as they were before each of the latest writes, the oldest first.
  const past = Array.from({ length: shared ? WORKERS * age : 0 }, () => copyNetwork(net));
  const made = { net, way, period, age, density, optimizer, ...options };
  return {
    made,
    way,
    period,
    density,
    workers,
    past,
    steps: 0,
    bytes: 0,
    agree: true,
    touched: null,
  };
}

/** Returns a copy of a crew without masks, which goes on with batches in another order. */
export function branchCrew(crew, seed) {
  const copy = createCrew({ ...crew.made, seed });
  crew.workers.forEach((worker, p) => {
    const mine = copy.workers[p];
    const { velocities } = worker.training.state;
    write(arraysOf(mine.net), arraysOf(worker.net));
    write(arraysOf(mine.training.state.velocities), arraysOf(velocities));
    write(mine.known, worker.known);
    for (const residuals of ["waiting", "late"]) {
      mine[residuals] = worker[residuals]?.map((array) => array.slice()) ?? null;
    }
  });
  copy.past = crew.past.map(copyNetwork);
  return Object.assign(copy, { steps: crew.steps, bytes: crew.bytes, agree: crew.agree });
}

/** Takes one step: each worker sees its part of one batch. */
export function crewStep(crew) {
  crew.agree = false;
  crew.touched = null;
  if (crew.way === "asynchronous") for (const worker of crew.workers) stepShared(crew, worker);
  for (const group of WAYS[crew.way].groups) {
    stepTogether(
      crew,
      group.map((p) => crew.workers[p]),
    );
  }
  crew.steps++;
}

/** Averages the weights of all where it is time for that, and returns whether it was. */
export function averageWhenDue(crew) {
  const due = WAYS[crew.way].averaged && crew.steps % crew.period === 0;
  if (due) averageAll(crew);
  crew.agree ||= due; // all have the same weights
  return due;
}

/**
 * Every worker ranks the weights that it has, or last read, and removes the smallest; or the first one does, and all take
 * its masks. From then on each holds its own.
 * Twin: gp.prune and gp.Masks.hold in each process.
 */
export function pruneCrew(crew, sparsity, decides) {
  const seen = crew.workers.map(({ net }, p) => crew.past[p] ?? net);
  const chosen = seen.map(({ weights }) =>
    pruneMasks(magnitudeScores(weights), sparsity, "global"),
  );
  crew.workers.forEach((worker, p) => {
    worker.masks = decides === "one" ? chosen[0] : chosen[p];
    worker.training.masks = worker.masks;
    const { velocities } = worker.training.state;
    const held = [worker.net.weights, velocities.weights, weightsOf(worker.known)];
    for (const residuals of [worker.waiting, worker.late])
      if (residuals) held.push(weightsOf(residuals));
    for (const weights of held) applyMasks(weights, worker.masks);
  });
}

/** Returns in how many weights the workers' masks are not all the same. */
export function differing({ workers }) {
  const masks = workers.map((worker) => worker.masks);
  return countWeights(masks[0], (layer, i) =>
    masks.some((mask) => mask[layer][i] !== masks[0][layer][i]),
  );
}

/** Returns how many weights are zero for the first worker; in shared memory, after each worker's step of the last one. */
export function zeros({ workers, touched }) {
  const weights = touched ?? workers[0].net.weights;
  return countWeights(weights, (layer, i) => weights[layer][i] === 0);
}

/** Returns one worker of each group that shares its network or steps together, and so has the same weights. */
export function heads({ way, workers }) {
  const { groups } = WAYS[way];
  return groups.length > 0 ? groups.map(([p]) => workers[p]) : workers.slice(0, 1);
}

/** Returns for each of a layer's weights how many workers keep it. */
export function keepers({ workers }, layer) {
  return workers[0].net.weights[layer].map((_, i) =>
    workers.reduce((sum, { masks }) => sum + (masks ? masks[layer][i] : 1), 0),
  );
}

function stepTogether(crew, group) {
  const gradients = group.map(({ training }) => nextGradients(training));
  if (group.length > 1) {
    group.forEach((worker, at) => {
      sendGradients(crew, worker, gradients[at]);
    });
    writeMeans(gradients.map(({ all }) => all));
  }
  group.forEach(({ training }, at) => {
    takeStep(training, gradients[at]);
  });
}

/** A step on the shared weights, by a gradient at the weights that the worker read some steps ago. */
function stepShared(crew, worker) {
  const gradients = nextGradients(worker.training, crew.past[0] ?? worker.net);
  sendGradients(crew, worker, gradients);
  takeStep(worker.training, gradients);
  if (crew.past.length > 0) {
    crew.past.shift();
    crew.past.push(copyNetwork(worker.net));
  }
  if (!worker.masks) return;
  crew.touched ??= worker.net.weights.map((array) => new Uint8Array(array.length));
  crew.touched.forEach((marks, layer) => {
    for (let i = 0; i < marks.length; i++) if (worker.net.weights[layer][i] !== 0) marks[i] = 1;
  });
}

/** All go on from the mean of their weights; where not all is sent, from the mean of what is known of each. */
function averageAll(crew) {
  for (const worker of crew.workers) {
    const change = arraysOf(worker.net).map((array, a) =>
      array.map((w, i) => w - worker.known[a][i]),
    );
    send(crew, worker, change, "late");
    change.forEach((array, a) => {
      for (let i = 0; i < array.length; i++) worker.known[a][i] += array[i];
    });
  }
  writeMeans(crew.workers.map(({ known }) => known));
  for (const { net, known } of crew.workers) write(arraysOf(net), known);
}

/** Gradients of pruned weights move nothing, so nothing of them is sent. */
function sendGradients(crew, worker, gradients) {
  if (worker.masks) applyMasks(gradients.weights, worker.masks);
  send(crew, worker, gradients.all, "waiting");
}

/** Leaves what is sent: all, in 4 bytes an entry, or the largest, in 4 for each and 4 for its place. The others wait. */
function send(crew, worker, arrays, place) {
  const entries = countAll(arrays);
  if (crew.density === 1) {
    crew.bytes += 4 * entries;
    return;
  }
  worker[place] ??= createFeedback(arrays);
  crew.bytes += 8 * Math.round(topFraction(arrays, crew.density, worker[place]) * entries);
}

/** Writes the mean of several gradients, or networks, into each of them. */
function writeMeans(several) {
  several[0].forEach((array, a) => {
    for (let i = 0; i < array.length; i++) {
      let sum = 0;
      for (const arrays of several) sum += arrays[a][i];
      for (const arrays of several) arrays[a][i] = sum / several.length;
    }
  });
}

function write(to, from) {
  to.forEach((array, a) => {
    array.set(from[a]);
  });
}

const arraysOf = ({ weights, biases }) => weights.flatMap((array, layer) => [array, biases[layer]]);
const weightsOf = (arrays) => arrays.filter((_, a) => a % 2 === 0);

function countWeights(arrays, counts) {
  let found = 0;
  arrays.forEach((array, layer) => {
    for (let i = 0; i < array.length; i++) if (counts(layer, i)) found++;
  });
  return found;
}
