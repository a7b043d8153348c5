"""Run sides in turn, time them, and write what came out with what is needed to get it again."""

import argparse
import os
import statistics
import threading
import time
from pathlib import Path

import numpy as np
import torch

from gradprune.lab import experiment

RESULTS = Path(__file__).resolve().parents[2] / "chapters" / "results"


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def parser(description):
    """The options that every benchmark has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: seconds of processor time, for a machine that others use too",
    )
    return options


def settle(options):
    """Apply the common options, and remember them for the record."""
    torch.set_num_threads(options.threads)
    _SETTINGS.update(clock=options.clock)


_SETTINGS = {"clock": "wall"}


def timed(run):
    """Seconds that `run` takes."""
    clock = CLOCKS[_SETTINGS["clock"]]
    start = clock()
    result = run()
    seconds = clock() - start
    del result
    return seconds


def in_turn(sides, rounds, *, before=lambda: None):
    """Seconds of each side, `rounds` times in turn, so that whatever else the machine does falls on all alike."""
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            before()
            seconds[name].append(timed(run))
    return seconds


def ratios(numerator, denominator):
    """The ratio round by round: its median and quartiles."""
    each = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return dict(zip(("lower quartile", "median", "upper quartile"), np.quantile(each, [0.25, 0.5, 0.75]), strict=True))


def summary(seconds):
    """Median, least and most of one side's runs."""
    return {
        "median_s": statistics.median(seconds),
        "least_s": min(seconds),
        "most_s": max(seconds),
        "runs": len(seconds),
    }


class PeakMemory:
    """The most resident memory within a `with` block beyond what was resident before, in bytes."""

    def __enter__(self):
        self._running, self.before = True, _resident()
        self.peak = self.before
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while self._running:
            self.peak = max(self.peak, _resident())
            time.sleep(0.0005)

    def __exit__(self, *_):
        self.peak = max(self.peak, _resident())
        self._running = False
        self._thread.join()
        self.extra = self.peak - self.before


def _resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def table(rows):
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_text(row.get(c, "")) for c in columns] for row in rows)]
    widths = [max(len(r[i]) for r in cells) for i in range(len(columns))]
    for r in cells:
        print("  ".join(cell.rjust(w) for cell, w in zip(r, widths, strict=True)))


def _text(value):
    if isinstance(value, dict):  # a ratio
        low, middle, high = value.values()
        return f"{middle:.3g} ({low:.3g} to {high:.3g})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write(name, rows, *, seeds, **more):
    """Print the rows and write chapters/results/<name>.json."""
    table(rows)
    how = {
        "clock": {"wall": "wall-clock seconds", "cpu": "seconds of processor time"}[_SETTINGS["clock"]],
        "load": f"{os.getloadavg()[0]:.1f} processes ready to run, on average over the last minute",
        "threads": torch.get_num_threads(),
    }
    experiment.save(RESULTS / f"{name}.json", experiment.provenance(seeds) | how | more | {"rows": rows})
