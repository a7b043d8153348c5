// Where does a figure's chance come from, so that a seed repeats it?

/**
 * Returns a function that gives uniform numbers in [0, 1), a multiple of 2^-32 each.
 * Mulberry32, Ettinger (2017): 32 bits of state, every seed a whole number.
 */
export function generator(seed) {
  if (!Number.isInteger(seed)) throw new TypeError(`seed must be a whole number, got ${seed}`);
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let z = Math.imul(state ^ (state >>> 15), state | 1);
    z ^= z + Math.imul(z ^ (z >>> 7), z | 61);
    return ((z ^ (z >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Returns 0 to count - 1 in random order: Fisher and Yates, in place as Durstenfeld (1964). */
export function shuffled(count, uniform) {
  const order = Int32Array.from({ length: count }, (_, i) => i);
  for (let i = count - 1; i > 0; i--) {
    const j = Math.floor(uniform() * (i + 1));
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}
