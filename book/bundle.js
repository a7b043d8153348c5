// The widget manager of the built pages: what the book's widgets are made of, and nothing else of Jupyter's.

import "@lumino/widgets/style/index.css";
import * as base from "@jupyter-widgets/base";
import { HTMLManager } from "@jupyter-widgets/html-manager/lib/htmlmanager.js";

// The front end that the anywidget wheel ships is written for AMD: it hands `define` what it needs and how it is made.
let anywidget;
globalThis.define = (_needs, make) => {
  anywidget = make(base);
};
require("anywidget");
delete globalThis.define;

const STATE = "application/vnd.jupyter.widget-state+json";
const VIEW = "application/vnd.jupyter.widget-view+json";
const sheet = document.createElement("link");
sheet.rel = "stylesheet";
sheet.href = new URL("embed.css", document.currentScript.src);
document.head.prepend(sheet);

const loader = async (name) => {
  if (name !== "anywidget") throw new Error(`the page has no module ${name} for its widgets`);
  return anywidget;
};

// Show each widget where its view stands in the page.
addEventListener("DOMContentLoaded", async () => {
  const manager = new HTMLManager({ loader });
  for (const script of document.querySelectorAll(`script[type="${STATE}"]`)) {
    const models = await manager.set_state(JSON.parse(script.textContent));
    for (const place of document.querySelectorAll(`script[type="${VIEW}"]`)) {
      const { model_id } = JSON.parse(place.textContent);
      const model = models.find((one) => one.model_id === model_id);
      if (!model) continue;
      const area = document.createElement("div");
      area.className = "widget-subarea";
      place.before(area);
      await manager.display_view(manager.create_view(model), area);
    }
  }
});
