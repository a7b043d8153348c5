// How long does each way of running a network take in this browser, beside the dense network?

const LEAST = 10; // milliseconds that are timed at once: the browser's clock is coarse
const DENSE_WAY = "dense";

/** Returns times that are to be taken: of the dense network and of each way, at each level, round after round. */
export function createTimes(levels, ways, rounds) {
  const each = levels.flatMap((level) => [DENSE_WAY, ...ways].map((way) => [level, way]));
  const times = new Map(each.map(([level, way]) => [`${way} ${level}`, []]));
  return { times, turns: Array(rounds).fill(each).flat(), at: 0, each: each.length, done: 0 };
}

/** Takes the next one and returns whether there are more; `runOf(way, level)` is what runs. `done` counts whole rounds. */
export function takeTime(found, runOf) {
  const [level, way] = found.turns[found.at];
  found.times.get(`${way} ${level}`).push(millisecondsOf(runOf(way, level)));
  found.at += 1;
  found.done = Math.floor(found.at / found.each);
  return found.at < found.turns.length;
}

/** Returns the time of a way at a level over the dense one's, NaN before it is taken. */
export function shareOf(found, way, level) {
  return shortest(found, way, level) / shortest(found, DENSE_WAY, level);
}

/** Returns how many of `rows` at once a way reads in a millisecond: dense and each of `ways`; 0 before it is timed. */
export function ratesAt(found, ways, level, rows) {
  return [DENSE_WAY, ...ways].map((way) => rows / shortest(found, way, level) || 0);
}

// The shortest of the rounds: what else runs only adds.
function shortest({ times }, way, level) {
  const own = times.get(`${way} ${level}`);
  return own.length === 0 ? Number.NaN : Math.min(...own);
}

// Milliseconds of one run, over as many as take long enough for the browser's clock.
function millisecondsOf(run) {
  const began = performance.now();
  let times = 0;
  let took = 0;
  while (took < LEAST) {
    run();
    times += 1;
    took = performance.now() - began;
  }
  return took / times;
}
