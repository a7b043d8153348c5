"""The model of a config.json is asked where it can be made, without values; where not, nobody is the wiser for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # models are made from configurations; nothing is downloaded

import pytest
import torch

from gradprune.core.checkpoint import opened
from gradprune.deploy.architecture import layers_of
from gradprune.weights.eligible import eligible

tr = pytest.importorskip("transformers")

SOURCE = str(Path(__file__).parents[2] / "src")


@pytest.fixture
def saved(tmp_path):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    model = tr.BertForSequenceClassification(tr.BertConfig(**sizes, vocab_size=96, max_position_embeddings=32))
    model.save_pretrained(tmp_path)
    return model, tmp_path


def asked(folder):
    with opened(folder) as checkpoint:
        return layers_of(checkpoint)


def test_the_model_says_what_its_weights_are_in_its_order(saved):
    model, folder = saved
    state = torch.get_rng_state()
    found = asked(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.model == "BertForSequenceClassification"
    assert [name for name, weight in found.weights.items() if not weight.reason] == list(eligible(model))
    assert all(weight.parameter.is_meta for weight in found.weights.values())


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": None},
        {"architectures": ["NoSuchModel"]},
        {"architectures": ["AutoConfig"]},
        {"architectures": ["A", "B"]},
        {"architectures": ["LlamaForCausalLM"]},
        {"model_type": "no such type"},
        {"auto_map": {"AutoConfig": "mine.Config"}, "model_type": "mine"},
        {"hidden_size": "wide"},
    ],
)
def test_where_the_model_cannot_be_made_or_is_another_there_is_no_answer(saved, change):
    _, folder = saved
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | change))
    (folder / "mine.py").write_text("raise SystemExit('code of a checkpoint was run')")
    assert asked(folder) is None


def test_nothing_is_said_of_other_libraries_on_the_way(saved):
    script = f"from gradprune.deploy.command import main; main(['prune', {str(saved[1])!r}, '--sparsity', '0.5', "
    run = [sys.executable, "-c", script + "'--dry-run', '--quiet'])"]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": SOURCE})
    assert "weights go (50.00%)" in done.stdout or "weights would go" in done.stdout
    assert done.stderr == ""


def test_without_config_json_or_without_transformers_there_is_no_answer(saved, monkeypatch):
    _, folder = saved
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "transformers", None)
        assert asked(folder) is None
    (folder / "config.json").write_text("[not an object")
    assert asked(folder) is None
    (folder / "config.json").unlink()
    assert asked(folder) is None
