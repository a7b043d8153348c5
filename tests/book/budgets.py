"""What a page measures, as a reader's window shows it, and the budgets that it keeps."""

from playwright.sync_api import Page

WINDOW = {"width": 1200, "height": 900}
AT_MOST = {
    "minutes": 45,
    "screens": 20,
    "code share": 0.25,
    "code lines": 150,
    "longest cell": 20,
    "longest table": 12,
}
FIRST_SEEN = {"main": 0.7, "deeper": 1.5}  # screens above the first live figure, picture or slider

# What a reader of the page sees: folded parts are not there, and an empty line of code takes no time.
MEASURES = r"""() => {
  const all = (selector) => [...document.querySelectorAll('main ' + selector)];
  const seen = (e) => e.getBoundingClientRect().height > 0 && !e.closest('details:not([open])');
  const lines = (pre) => pre.innerText.trimEnd().split('\n');
  const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
  const cells = all('.cell_input').filter(seen);
  const code = cells.map((e) => [...e.querySelectorAll('pre')].flatMap(lines).filter((l) => l.trim()).length);
  const outputs = all('.cell_output pre').filter(seen);
  const rows = all('.cell_output .gp-numbers').filter(seen).map((table) => table.rows.length);
  const printed = [...outputs.map((pre) => lines(pre).length), ...rows];
  // An empty line ends a table.
  const blocks = outputs.flatMap((pre) => pre.innerText.trim().split(/\n\s*\n/)).map((t) => t.split('\n').length);
  const tables = [...blocks, ...rows];
  const prose = document.querySelector('main article').cloneNode(true);
  prose.querySelectorAll('details, .cell, script, style, .math, mjx-container, table').forEach((e) => e.remove());
  const words = prose.textContent.split(/\s+/).filter(Boolean).length;
  const equations = all('div.math').filter(seen).length;
  const figures = all('.cell_output svg, .cell_output img, .cell_output .gp-live, .jupyter-widgets').filter(seen);
  const tops = figures.map((e) => e.getBoundingClientRect().top + scrollY).filter((top) => top > 0);
  const first = Math.min(...tops);
  const height = document.documentElement.scrollHeight;
  return {
    'minutes': words / 130 + sum(code) / 15 + sum(printed) / 30 + equations / 2,
    'screens': height / innerHeight,
    'code share': sum(cells.map((e) => e.getBoundingClientRect().height)) / height,
    'code lines': sum(code),
    'longest cell': Math.max(0, ...code),
    'longest table': Math.max(0, ...tables),
    'first figure': tops.length ? first / innerHeight : null,
  };
}"""


def measures(page: Page) -> dict[str, float | None]:
    return page.evaluate(MEASURES)


def over_budget(found: dict[str, float | None], *, deeper: bool) -> list[str]:
    faults = [f"{name}: {found[name]:.3g}, at most {limit}" for name, limit in AT_MOST.items() if found[name] > limit]
    limit = FIRST_SEEN["deeper" if deeper else "main"]
    if found["first figure"] is None:
        faults.append("first figure: there is none")
    elif found["first figure"] > limit:
        faults.append(f"first figure: {found['first figure']:.3g} screens down, at most {limit}")
    return faults
