"""The README is true: its examples run as printed, its commands and files exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gradprune.lab import claims

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_there_is_an_example_of_a_pruned_loop():
    assert sum("Pruner" in code for code in EXAMPLES) == 1


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_runs_as_printed_and_the_pruned_loop_reaches_what_the_text_says(code, tmp_path):
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if "Pruner" not in code:
        return
    sparsity, accuracy = (float(number) for number in re.findall(r"([\d.]+)%", done.stdout))
    assert sparsity == pytest.approx(90, abs=0.1)
    assert accuracy > 93


def test_the_commands_on_files_run_as_printed(tmp_path):
    weights = {"0.weight": torch.randn(64, 64), "0.bias": torch.zeros(64)}
    save_file(weights, tmp_path / "model.safetensors")
    (commands,) = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    for line in commands.splitlines():
        program, *words = line.split()
        assert program == "python"
        subprocess.run([sys.executable, *words], cwd=tmp_path, check=True)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes["half.safetensors"] == sizes["model.safetensors"]
    assert sizes["half.packed.safetensors"] < 0.6 * sizes["model.safetensors"]


def test_every_file_it_links_to_exists():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_make_target_it_names_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"book", "test"} <= named <= targets


def test_the_pages_count_the_statements_right():
    for page in ("README.md", "book/start.md", "book/claims.md"):
        (said,) = re.findall(r"(\d+)\W* statements", (ROOT / page).read_text(encoding="utf-8"))
        assert int(said) == len(claims.all_claims()), page
