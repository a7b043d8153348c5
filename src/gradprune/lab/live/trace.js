// What has the reader seen so far, along an axis? Lines join what was seen a few steps apart; what lies further apart
// are single dots.

// `nearby`: how far apart two neighbours on a line may lie.
export function createTraces(nearby) {
  const traces = new Map();
  return {
    clear: () => traces.clear(),
    add(key, at, value) {
      if (!traces.has(key)) traces.set(key, new Map());
      traces.get(key).set(at, value);
    },
    // The marks for a chart; `classOf(key)` gives a trace its colour.
    marks: (classOf) =>
      [...traces].flatMap(([key, points]) => traceMarks(points, nearby, classOf(key))),
  };
}

function traceMarks(points, nearby, name) {
  const seen = [...points].sort(([a], [b]) => a - b);
  const broken = seen.flatMap((point, i) => {
    const far = i > 0 && point[0] - seen[i - 1][0] > nearby;
    return far ? [[point[0], Number.NaN], point] : [point];
  });
  const columns = (pairs) => ({ x: pairs.map(([at]) => at), y: pairs.map(([, value]) => value) });
  return [
    { kind: "line", ...columns(broken), class: name },
    { kind: "points", ...columns(seen), radius: 1.5, class: name },
  ];
}
