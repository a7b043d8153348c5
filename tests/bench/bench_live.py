"""What a live figure costs its reader: bytes, milliseconds to the first drawing, milliseconds a move and a frame."""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from playwright.sync_api import sync_playwright
from record import parser, settle, write

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / part) for part in ("book", "tests", "tests/lab/live")]

from page import opened, write_page  # noqa: E402
from vendor import VENDOR  # noqa: E402

from conftest import ARGUMENTS, chromium  # noqa: E402
from gradprune.lab.live import _FIGURES  # noqa: E402

# One input event at a share of the first slider's range, and the frame that it asks for. Returns how long the drawing
# took by the clock; nothing where the slider has no such step, and so nothing was drawn.
MOVE = """async (root, share) => {
  const slider = root.querySelector('input[type=range]');
  const frame = () => new Promise(requestAnimationFrame);
  const { drawn } = root.dataset;
  slider.value = Number(slider.min) + share * (slider.max - slider.min);
  slider.dispatchEvent(new Event('input', { bubbles: true }));
  await frame();
  await frame(); // laid out and painted
  return root.dataset.drawn === drawn ? null : Number(root.dataset.frame);
}"""
# Press the button that sets the figure going, where there is one, and note how long each step took by the clock until
# it rests, a minute at most.
GO = """(root) => new Promise((end) => {
  const buttons = [...root.querySelectorAll('.gp-live-controls button')];
  const button = buttons.find((one) => one.textContent !== 'Reset');
  const steps = [];
  const watcher = new MutationObserver((seen) => {
    if (seen.some((one) => one.attributeName === 'data-step')) steps.push(Number(root.dataset.step));
    if (root.dataset.running === 'false') end(steps);
  });
  watcher.observe(root, { attributeFilter: ['data-step', 'data-running'] });
  setTimeout(() => end(steps), 60_000);
  if (button) button.click();
  else end(steps);
})"""
# When the figure is drawn for the first time, in milliseconds since the page was asked for.
WATCH = """new MutationObserver((_, watcher) => {
  if (!document.querySelector('.gp-live[data-drawn]')) return;
  globalThis.firstDrawing = performance.now();
  watcher.disconnect();
}).observe(document, { subtree: true, childList: true, attributeFilter: ['data-drawn'] });"""


class MainThread:
    """Processor time of a page's main thread, in milliseconds: scripts, styles, layout and painting."""

    def __init__(self, page):
        self._session = page.context.new_cdp_session(page)
        self._session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def taken(self):
        metrics = self._session.send("Performance.getMetrics")["metrics"]
        return 1000 * next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")


def dragged(root, moves):
    """Milliseconds of each move: the drawing by the clock, and the whole of it in processor time."""
    thread, drawing, whole = MainThread(root.page), [], []
    root.evaluate(MOVE, 0)
    for move in range(1, moves + 1):
        before = thread.taken()
        frame = root.evaluate(MOVE, move / moves)
        if frame is not None:
            drawing.append(frame)
            whole.append(thread.taken() - before)
    return drawing, whole


def stepped(browser, root):
    """Milliseconds of each frame of a figure that was set going: steps by the clock, the whole in processor time."""
    browser.start_tracing(page=root.page, categories=["devtools.timeline", "disabled-by-default-devtools.timeline"])
    steps = root.evaluate(GO)
    events = json.loads(browser.stop_tracing())["traceEvents"]
    callbacks = [event for event in events if event["name"] == "FireAnimationFrame" and "tdur" in event]
    tasks = [event for event in events if event["name"] == "RunTask" and "tdur" in event]
    whole = [task["tdur"] / 1000 for task in tasks if any(_within(callback, task) for callback in callbacks)]
    return steps, whole if steps else []


def _within(event, task):
    same = (event["pid"], event["tid"]) == (task["pid"], task["tid"])
    return same and task["ts"] <= event["ts"] <= task["ts"] + task["dur"]


def spread(name, milliseconds):
    """Median, 95th percentile and maximum, each in a column of its own."""
    quantiles = {"median": 0.5, "95 %": 0.95, "longest": 1.0}
    return {f"{name}, {word}": float(np.quantile(milliseconds, share)) for word, share in quantiles.items()}


def measured(browser, name, folder, arguments):
    """The row of one figure; each round is a fresh page."""
    figure = _FIGURES[name]()
    path = write_page(figure, folder / f"{name}.html")
    first, drawing, whole, steps, frames = [], [], [], [], []
    for _ in range(arguments.rounds):
        with opened(browser, path, reduced_motion="no-preference", watch=WATCH) as root:
            first.append(root.page.evaluate("firstDrawing"))
            for kept, more in zip((drawing, whole), dragged(root, arguments.moves), strict=True):
                kept += more
            for kept, more in zip((steps, frames), stepped(browser, root), strict=True):
                kept += more
    shared = sum((VENDOR / "widgets" / part).stat().st_size for part in ("embed.js", "embed.css"))
    return {
        "figure": name,
        "page, MB": (path.stat().st_size + shared) / 1e6,
        "its own, kB": path.stat().st_size / 1e3,
        "script, kB": len(figure._esm.encode()) / 1e3,
        "first drawing": float(np.median(first)),
        "moves": len(drawing),
        **spread("move", whole),
        **spread("drawing", drawing),
        **({"frames": len(frames), **spread("frame", frames), **spread("step", steps)} if steps else {}),
    }


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--moves", type=int, default=100)
    options.add_argument("--figures", nargs="+", default=list(_FIGURES), choices=list(_FIGURES))
    arguments = options.parse_args()
    settle(arguments)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=chromium(), args=ARGUMENTS)
        rows = [measured(browser, name, Path(folder), arguments) for name in arguments.figures]
        write("bench_live", rows, seeds=[0], browser=f"Chromium {browser.version}, drawing on the processor")
