"""The rule over pieces is that of a plain sort, whatever bracket and bins; memory does not grow with the file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradprune.core.checkpoint import Memory, Tensors
from gradprune.deploy import threshold
from gradprune.deploy.threshold import Rule, order_of, rules

SOURCE = Path(__file__).parents[2] / "src"


def as_tensors(values):
    part = Memory("m", values, {})
    return {name: Tensors(part, part.header.entries[name]) for name in values}


def sorted_rule(values, keep, order):
    """By a plain sort: the key of the smallest that stays, and how many of its ties go."""
    keys = torch.cat([order.keys(order.compared(v.reshape(-1))).to(torch.int64) for v in values.values()])
    down = keys.sort(descending=True).values
    key = int(down[keep - 1])
    return Rule(key, int((keys == key).sum()) - int((down[:keep] == key).sum()))


@settings(max_examples=150)
@given(
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    kind=st.sampled_from(["normal", "few", "one", "wide", "infinite"]),
    share=st.floats(0, 1),
    bins=st.sampled_from([4, 64, 2**22]),
    gathered=st.sampled_from([0, 30, 2**24]),
    deviations=st.sampled_from([0.0, 4.0]),
)
def test_the_rule_is_that_of_a_sort(sizes, dtype, kind, share, bins, gathered, deviations):
    generator = torch.Generator().manual_seed(len(sizes))
    values = {}
    for i, size in enumerate(sizes):
        value = torch.randn(size, generator=generator, dtype=torch.float64)
        if kind == "few":
            value = value.round()
        elif kind == "one":
            value.fill_(1.0)
        elif kind == "wide":
            value = (10 * value).exp() * value.sign()
        elif kind == "infinite":
            value[::3] = float("inf")
        values[str(i)] = value.to(dtype)
    total = sum(sizes)
    keep = min(total, max(1, round(share * total)))
    with pytest.MonkeyPatch.context() as patched:
        settings_of = {"VALUES": 50, "BLOCKS": 16, "IN_BLOCK": 4, "BINS": bins, "GATHERED": gathered}
        for name, value in (settings_of | {"DEVIATIONS": deviations}).items():
            patched.setattr(threshold, name, value)
        tensors = as_tensors(values)
        order = order_of(tensors)
        found, alone = rules(tensors, keep, dict.fromkeys(values, 0), order, lambda _: None)
    assert alone == {}
    assert found == sorted_rule(values, keep, order)


def test_a_bracket_that_misses_costs_readings_and_no_exactness(monkeypatch):
    values = {"a": torch.randn(5000)}
    tensors = as_tensors(values)
    order = order_of(tensors)
    for low, high in ((0, 1), (order.highest, order.highest + 1), (5, 6)):
        monkeypatch.setattr(threshold, "_bracket", lambda *_, low=low, high=high: (low, high))
        found, _ = rules(tensors, 1234, {"a": 0}, order, lambda _: None)
        assert found == sorted_rule(values, 1234, order)


def test_of_tied_tensors_the_earlier_is_short(monkeypatch):
    """All equal: the last entries stay, so the first tensor would be empty and keeps its last."""
    tensors = as_tensors({"a": torch.ones(4), "b": torch.ones(4), "c": torch.ones(4)})
    found, alone = rules(tensors, 6, dict.fromkeys("abc", 1), order_of(tensors), lambda _: None)
    assert alone == {"a": Rule(found.key, 3)}
    assert found.surplus == 8 - 5


MEMORY = """
import json, resource, sys
from pathlib import Path

import gradprune as gp
from gradprune.deploy.pruned import prune_file

def peak():  # what this process has had at most, not what its parent had before it became this one
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

source, folder = sys.argv[1], Path(sys.argv[2])
prune_file(source + ".small", folder / "s", sparsity=0.5)  # what libraries take once
gp.pack(folder / "s", folder / "t")
before, found = peak(), {}
ways = {"global": {}, "layer": {"scope": "layer"}, "2:4": {"granularity": "2:4"}, "lamp": {"scope": "lamp"}}
for name, way in ways.items():
    prune_file(source, folder / "p", **({} if name == "2:4" else {"sparsity": 0.5}), **way)
    found[name] = peak() - before
gp.pack(folder / "p", folder / "k")
gp.unpack(folder / "k", folder / "u")
found["pack"] = peak() - before
print(json.dumps(found))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak is read from Linux' /proc")
def test_in_a_fresh_process_memory_is_a_fraction_of_the_file(tmp_path):
    """Of 300 MB, one tensor of 200; the bounds are those of a file of any size: one of 2 GB took as much."""
    from safetensors.torch import save_file

    small = {"a.weight": torch.randn(64, 64, dtype=torch.bfloat16)}
    save_file(small, tmp_path / "m.small")
    large = {"a.weight": torch.randn(25_000, 4_000).bfloat16(), "b.weight": torch.randn(12_500, 4_000).bfloat16()}
    save_file(large, tmp_path / "m")
    del large
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "m"), str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(SOURCE)}
    )
    found = json.loads(done.stdout)
    print(found)
    assert found["global"] < 120e6
    assert max(found.values()) < 260e6
