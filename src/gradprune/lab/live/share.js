// How do layers share the weights that stay, so that the counts are whole and add up?

/**
 * Returns whole numbers that add up to `total`, proportional to `shares` as far as bounds allow.
 * What rounding down leaves over goes to the largest remainders, the earlier first among equals.
 * Twin: gradprune.weights.allocate.share_out.
 */
export function shareOut(shares, total, low, high) {
  const [least, most] = [exactSum(low), exactSum(high)];
  if (!(least <= total && total <= most)) {
    throw new RangeError(`cannot share ${total}: the bounds add up to ${least} and ${most}`);
  }
  const ideal = idealShares(shares, total, low, high);
  const counts = ideal.map((x, i) => Math.max(Math.floor(x), low[i]));
  const remainder = (i) => ideal[i] - counts[i];
  const byRemainder = counts.map((_, i) => i).sort((i, j) => remainder(j) - remainder(i));
  let missing = total - exactSum(counts);
  while (missing > 0) {
    for (const i of byRemainder) {
      if (missing === 0 || counts[i] === high[i]) continue;
      counts[i]++;
      missing--;
    }
  }
  return counts;
}

/** The shares times the one factor at which, bounded, they add up to the total. */
function idealShares(shares, total, low, high) {
  const bounded = (factor) => shares.map((s, i) => Math.min(Math.max(factor * s, low[i]), high[i]));
  let smaller = 0;
  let larger = Math.max(0, ...shares.map((s, i) => (s > 0 ? high[i] / s : 0)));
  for (let halving = 0; halving < 200; halving++) {
    const factor = (smaller + larger) / 2;
    if (exactSum(bounded(factor)) < total) smaller = factor;
    else larger = factor;
  }
  return bounded(larger);
}

/** The sum, and beside it what each addition's rounding lost: Neumaier (1974). */
function exactSum(numbers) {
  let [sum, lost] = [0, 0];
  for (const x of numbers) {
    const next = sum + x;
    lost += Math.abs(sum) >= Math.abs(x) ? sum - next + x : x - next + sum;
    sum = next;
  }
  return sum + lost;
}
