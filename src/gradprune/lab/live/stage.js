// What is a figure's frame: its root, its live sentence, when it is drawn, and when its animation rests?

export const element = (tag, attributes = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
};

// Controls above, panels below, the sentence between them. `name` is what tests and style sheets call the figure.
export function createStage(el, name, title) {
  const controls = element("div", { class: "gp-live-controls" });
  const words = element("p", { class: "gp-live-words" });
  const spoken = element("p", { class: "gp-live-spoken", role: "status" });
  const panels = element("div", { class: "gp-live-panels" });
  const attributes = { class: "gp-live", "data-figure": name, "aria-label": title };
  const root = element("section", attributes, controls, words, spoken, panels);
  el.replaceChildren(root);
  return { root, controls, words, spoken, panels, timer: 0, frame: 0, ends: [] };
}

// What a figure that trains says under its panels; tests hold three of them to it.
export function sayPrecision(stage) {
  const words =
    "The page computes in single precision and adds in another order than Python: after many steps the last digits may differ, by less than they do from one order of the batches to another.";
  stage.root.append(element("p", { class: "gp-live-note" }, words));
}

// Write what is shown where tests read it (data- attributes), readers see it, and, when it rests, screen readers say it.
export function say(stage, facts, sentence) {
  for (const [name, value] of Object.entries(facts)) stage.root.dataset[name] = String(value);
  stage.words.textContent = sentence;
  clearTimeout(stage.timer);
  stage.timer = setTimeout(() => {
    stage.spoken.textContent = sentence;
  }, 600);
}

// A function that asks for one drawing in the next frame, however often it is called before. What a frame took, in
// milliseconds, stands in data-frame; data-drawn counts the frames.
export function drawer(stage, draw) {
  let asked = false;
  let drawn = 0;
  return () => {
    if (asked) return;
    asked = true;
    stage.frame = requestAnimationFrame(() => {
      asked = false;
      const began = performance.now();
      draw();
      stage.root.dataset.frame = (performance.now() - began).toFixed(2);
      drawn += 1;
      stage.root.dataset.drawn = String(drawn);
    });
  };
}

export const wantsLessMotion = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

// Call `step` once a frame until it returns false, then `done`; `stop` ends it before, without `done`. The animation rests
// while the figure is out of sight.
// Under "reduce motion" nothing is seen to move: all steps are taken, in slices that leave the page usable, and only
// the end is drawn.
export function animator(stage, { step, draw, done }) {
  let running = false;
  let inSight = true;
  const tick = () => {
    if (!running || !inSight) return;
    const began = performance.now();
    const still = wantsLessMotion();
    let more = step();
    while (still && more && performance.now() - began < 12) more = step();
    if (!still || !more) draw();
    stage.root.dataset.step = (performance.now() - began).toFixed(2);
    if (more) requestAnimationFrame(tick);
    else {
      stop();
      done();
    }
  };
  const stop = () => {
    if (running) stage.root.dataset.running = "false";
    running = false;
  };
  const watcher = new IntersectionObserver(([seen]) => {
    const before = inSight;
    inSight = seen.isIntersecting;
    if (running && inSight && !before) requestAnimationFrame(tick);
  });
  watcher.observe(stage.root);
  stage.ends.push(() => watcher.disconnect());
  return {
    start() {
      if (running) return;
      running = true;
      stage.root.dataset.running = "true";
      requestAnimationFrame(tick);
    },
    stop,
    isRunning: () => running,
  };
}

// Tell the kernel, where there is one, what the reader chose; take from it what it sets.
export function publish(model, traits) {
  for (const [name, value] of Object.entries(traits)) model.set(name, value);
  model.save_changes();
}

// The values of some traits, by their names.
export const settingsOf = (model, names) =>
  Object.fromEntries(names.map((name) => [name, model.get(name)]));

// Calls `follow` after traits of these names have changed, once for all that change together, as long as the figure stands
// on the page. Returns a function that asks for that too.
export function listen(stage, model, names, follow) {
  let asked = false;
  let standing = true;
  const ask = () => {
    if (asked) return;
    asked = true;
    queueMicrotask(() => {
      asked = false;
      if (standing) follow();
    });
  };
  for (const name of names) model.on(`change:${name}`, ask);
  stage.ends.push(() => {
    standing = false;
    for (const name of names) model.off(`change:${name}`, ask);
  });
  return ask;
}

// What `render` returns: ends what the figure started, when its element is taken off the page.
export const closing = (stage) => () => {
  clearTimeout(stage.timer);
  cancelAnimationFrame(stage.frame);
  for (const end of stage.ends) end();
};
