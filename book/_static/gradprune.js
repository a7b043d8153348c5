// What the vendored scripts leave undone for the book's sliders: names and values for assistive technology, and formulas
// inside widgets. The widget manager calls MathJax 2's queue; this passes the call on to MathJax 3.

window.MathJax = window.MathJax || {};
window.MathJax.Hub = {
  Queue: (...calls) => {
    for (const [what, , element] of calls) {
      if (
        what === "Typeset" &&
        window.MathJax.typesetPromise &&
        element?.textContent.match(/\$|\\\(/)
      ) {
        window.MathJax.startup.promise.then(() => window.MathJax.typesetPromise([element]));
      }
    }
  },
};

const visibleFrame = (explorer) =>
  [...explorer.querySelectorAll(".gp-frame")].find((frame) => frame.getClientRects().length > 0);

let choices = 0;

function describe(explorer) {
  const setting = visibleFrame(explorer)?.dataset.setting;
  for (const slider of explorer.querySelectorAll(".widget-slider")) {
    const handle = slider.querySelector("[role=slider]");
    const label = slider.querySelector(".widget-label")?.textContent;
    if (handle && label) {
      handle.setAttribute("aria-label", label);
      if (setting) handle.setAttribute("aria-valuetext", setting);
    }
  }
  for (const radios of explorer.querySelectorAll(".widget-radio")) {
    const box = radios.querySelector(".widget-radio-box");
    box?.setAttribute("role", "radiogroup");
    box?.setAttribute("aria-label", radios.querySelector(".widget-label")?.textContent);
    // One name for all of a group: then the arrow keys move within it.
    for (const input of radios.querySelectorAll("input:not([name])"))
      input.name = radios.querySelector("input[name]")?.name ?? `gp-choice-${choices++}`;
  }
  for (const words of explorer.querySelectorAll(".gp-words"))
    words.setAttribute("aria-live", "polite");
}

// Explorers appear when the widget manager has drawn them, and frames when they are first shown. Only what has changed is
// described again: looking for the visible frame makes the browser lay out the page.
new MutationObserver((changes) => {
  const changed = new Set();
  for (const { target, addedNodes } of changes) {
    const around = target.closest(".gp-explore");
    if (around) changed.add(around);
    else
      for (const node of addedNodes)
        for (const inside of node.querySelectorAll?.(".gp-explore") ?? []) changed.add(inside);
  }
  changed.forEach(describe);
}).observe(document.documentElement, {
  childList: true,
  subtree: true,
  attributes: true,
  attributeFilter: ["aria-valuenow", "class", "style"],
});

// Names and roles that the theme and docutils leave out.
document.addEventListener("DOMContentLoaded", () => {
  // The arrows that unfold the contents at the side have no text.
  for (const arrow of document.querySelectorAll("nav li > details > summary")) {
    const entry = arrow.closest("li").querySelector("a")?.textContent.trim();
    arrow.setAttribute("aria-label", `Pages under ${entry}`);
  }
  // The role of an entry in a bibliography is no longer part of ARIA, and hides that it stands in a list.
  for (const entry of document.querySelectorAll(".citation-list > .citation"))
    entry.setAttribute("role", "listitem");
});

// The definition of a term, beside a link to the glossary, on hover and on focus. It stays while the pointer is on it, and
// Escape puts it away.
document.addEventListener("DOMContentLoaded", () => {
  const links = document.querySelectorAll("a[data-definition]");
  if (links.length === 0) return;
  const tip = document.createElement("div");
  Object.assign(tip, { id: "gp-tip", className: "gp-tip", role: "tooltip", hidden: true });
  let leaving = 0;
  let shownFor = null;
  const hide = () => {
    tip.hidden = true;
    shownFor?.removeAttribute("aria-describedby");
    shownFor = null;
  };
  const show = (link) => {
    clearTimeout(leaving);
    if (shownFor === link) return;
    hide();
    shownFor = link;
    tip.innerHTML = link.dataset.definition;
    tip.hidden = false;
    link.setAttribute("aria-describedby", tip.id);
    const at = link.getClientRects()[0];
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    const below = at.bottom + tip.offsetHeight + 8 < innerHeight;
    tip.style.left = `${scrollX + Math.max(8, Math.min(at.left, room))}px`;
    tip.style.top = `${scrollY + (below ? at.bottom + 4 : at.top - tip.offsetHeight - 4)}px`;
    if (tip.querySelector(".math")) window.MathJax?.typesetPromise?.([tip]);
  };
  for (const link of links) {
    link.addEventListener("mouseenter", () => show(link));
    link.addEventListener("focus", () => show(link));
    link.addEventListener("blur", hide);
  }
  for (const part of [tip, ...links])
    part.addEventListener("mouseleave", () => {
      leaving = setTimeout(hide, 200);
    });
  tip.addEventListener("mouseenter", () => clearTimeout(leaving));
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
  document.body.append(tip);
});

// The claims page: three choices that narrow its tables down. Without scripts the form stays hidden and all is shown.
document.addEventListener("DOMContentLoaded", () => {
  const form = document.querySelector("form.gp-filter");
  if (!form) return;
  const tables = [...document.querySelectorAll("table.gp-claims")];
  const narrow = () => {
    const wanted = [...new FormData(form)]
      .filter(([, value]) => value)
      .map(([name, value]) => `gp-${name}-${value}`);
    let shown = 0;
    for (const table of tables) {
      const rows = [...table.tBodies[0].rows];
      for (const row of rows) row.hidden = !wanted.every((name) => row.classList.contains(name));
      const left = rows.filter((row) => !row.hidden).length;
      table.closest("section").hidden = left === 0;
      shown += left;
    }
    form.querySelector("output").textContent = `${shown} shown`;
  };
  form.addEventListener("change", narrow);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.querySelector("output").setAttribute("aria-live", "polite");
  form.hidden = false;
  narrow(); // a browser keeps choices over a reload
});

// A link into something that is folded opens it.
const unfold = () => {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let fold = target?.closest("details"); fold; fold = fold.parentElement.closest("details"))
    fold.open = true;
  if (target?.closest("details")) target.scrollIntoView();
};
document.addEventListener("DOMContentLoaded", unfold);
window.addEventListener("hashchange", unfold);
