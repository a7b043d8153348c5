import assert from "node:assert/strict";
import { test } from "node:test";
import { listen, settingsOf } from "../../../src/gradprune/lab/live/stage.js";

// What anywidget's model does of what is tried here.
function createModel(traits) {
  const followers = new Map();
  return {
    get: (name) => traits[name],
    set(name, value) {
      const changed = traits[name] !== value;
      traits[name] = value;
      if (changed) for (const follow of followers.get(`change:${name}`) ?? []) follow();
    },
    on: (name, follow) => followers.set(name, [...(followers.get(name) ?? []), follow]),
    off: (name, follow) =>
      followers.set(
        name,
        followers.get(name).filter((other) => other !== follow),
      ),
  };
}

test("traits that change together are followed once, when all have changed", async () => {
  const model = createModel({ depth: 1, scale: 1, other: 1 });
  const seen = [];
  const names = ["depth", "scale"];
  const ask = listen({ ends: [] }, model, names, () => seen.push(settingsOf(model, names)));
  model.set("depth", 2);
  model.set("scale", 3);
  ask();
  assert.deepEqual(seen, []);
  await null;
  assert.deepEqual(seen, [{ depth: 2, scale: 3 }]);
  model.set("other", 2);
  await null;
  assert.equal(seen.length, 1);
  ask();
  await null;
  assert.equal(seen.length, 2);
});

test("a figure that is taken off the page follows no more", async () => {
  const model = createModel({ depth: 1 });
  const stage = { ends: [] };
  let count = 0;
  listen(stage, model, ["depth"], () => {
    count += 1;
  });
  model.set("depth", 2);
  for (const end of stage.ends) end();
  model.set("depth", 3);
  await null;
  assert.equal(count, 0);
});
