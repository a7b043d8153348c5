"""A model that is pruned from its files: to the bits of the one in memory, whatever happens in between."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # models are made from configurations; nothing is downloaded

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import gradprune as gp
from gradprune.core.checkpoint import opened
from gradprune.core.written import Resumed
from gradprune.lab.residual import residual
from gradprune.recovery import replay
from gradprune.recovery.stored import Stored, made_without_values

tr = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:fewer inputs than columns")

WORDS = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = WORDS | {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 64}
TOKENS = [{"input_ids": torch.randint(3, 96, (8, 24), generator=torch.Generator().manual_seed(i))} for i in range(3)]
SIGNALS = [torch.randn(64, 40, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def llama(tied=True, **more):
    return tr.LlamaForCausalLM(tr.LlamaConfig(**TEXT, num_key_value_heads=2, tie_word_embeddings=tied, **more))


def gpt2():
    return tr.GPT2LMHeadModel(tr.GPT2Config(n_embd=32, n_head=4, n_layer=3, n_positions=32, **WORDS))


def attention():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)


def two_layers():
    return nn.Sequential(nn.Linear(40, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 6))


MODELS = {
    "Llama, tied head": (llama, TOKENS),
    "Llama": (lambda: llama(tied=False), TOKENS),
    "GPT-2": (gpt2, TOKENS),
    "torch's attention": (attention, [torch.randn(4, 10, 16, generator=torch.Generator().manual_seed(0))]),
    "residual, no chain": (lambda: residual(8), SIGNALS),
    "batch norm": (two_layers, SIGNALS),
}


def seeded(make):
    torch.manual_seed(0)
    return make()


def stored(model, folder, *, shards=False):
    """A checkpoint of a model: a file, or a folder of several with their index."""
    folder.mkdir()
    tensors = {n: t.clone() for n, t in model.state_dict().items() if "lm_head" not in n or not tied(model)}
    if not shards:
        save_file(tensors, folder / "model.safetensors", {"format": "pt", "own": "kept"})
        return folder / "model.safetensors"
    where = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(where.values()):
        save_file({n: tensors[n] for n in tensors if where[n] == shard}, folder / shard, {"own": shard})
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return folder


def tied(model):
    return getattr(getattr(model, "config", None), "tie_word_embeddings", False)


def loaded(path):
    """All tensors of a checkpoint."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def headers(path):
    with opened(path) as checkpoint:
        return [part.header.text for part in checkpoint.parts]


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ------------------------------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("shards", [False, True], ids=["file", "shards"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "how", [{"sparsity": 0.5, "solve": "one pass"}, {"sparsity": 0.6, "scope": "row"}, {"granularity": (2, 4)}]
)
def test_the_file_holds_what_reconstruct_makes_of_the_model_in_memory_bit_for_bit(name, how, shards, tmp_path):
    make, batches = MODELS[name]
    if how.get("granularity") and name == "residual, no chain":
        how = how | {"exclude": ["stem.weight", "*depthwise*"]}
    model = seeded(make)
    source, target = stored(model, tmp_path / "source", shards=shards), tmp_path / ("out" if shards else "out.st")
    before = loaded(source)
    done = gp.reconstruct_file(make, source, target, batches, **how)
    masks = gp.reconstruct_(model, batches, **how)
    found = loaded(target)
    assert all(torch.equal(found[n], t) for n, t in model.state_dict().items() if n in found)
    assert {n: pytest.approx(1 - float(mask.float().mean())) for n, mask in masks.items()} == done.layers
    assert done.path == target
    assert done.sparsity == pytest.approx(masks.sparsity)
    assert headers(target) == headers(source)
    assert same(loaded(source), before)
    if shards:
        assert names(target) == names(source)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["source", target.name])


def test_transformers_load_what_is_written(tmp_path):
    model = seeded(llama).eval()
    model.save_pretrained(tmp_path / "source", max_shard_size="40KB")
    gp.reconstruct_file(llama, tmp_path / "source", tmp_path / "target", TOKENS, sparsity=0.5)
    gp.reconstruct_(model, TOKENS, sparsity=0.5)
    found = tr.LlamaForCausalLM.from_pretrained(tmp_path / "target")
    with torch.no_grad():
        assert torch.equal(found(**TOKENS[0]).logits, model(**TOKENS[0]).logits)


def test_a_network_of_save_is_one_afterwards_and_replaces_what_stood_there(tmp_path):
    model = seeded(two_layers)
    gp.save(model, tmp_path / "a")
    gp.reconstruct_file(two_layers, tmp_path / "a", tmp_path / "a", SIGNALS, sparsity=0.5)
    gp.reconstruct_(model, SIGNALS, sparsity=0.5)
    assert same(gp.load(two_layers(), tmp_path / "a").state_dict(), model.state_dict())


def test_weights_have_the_dtypes_of_the_checkpoint(tmp_path):
    model = seeded(llama).to(torch.bfloat16)
    model.model.rotary_emb = llama().model.rotary_emb  # in float32, as from_pretrained has it
    source = stored(model, tmp_path / "source")
    gp.reconstruct_file(llama, source, tmp_path / "out", TOKENS, sparsity=0.5)
    gp.reconstruct_(model, TOKENS, sparsity=0.5)
    found = loaded(tmp_path / "out")
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in found.items())


def test_a_parameter_under_two_names_is_written_under_both(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(40, 40), nn.Linear(40, 40)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.one(x) + self.two(x)

    model = seeded(Twice)
    source = stored(model, tmp_path / "source")
    gp.reconstruct_file(lambda: Twice(), source, tmp_path / "out", SIGNALS, sparsity=0.5)
    gp.reconstruct_(model, SIGNALS, sparsity=0.5)
    assert same(loaded(tmp_path / "out"), dict(model.state_dict()))
    different = loaded(source)
    different["two.weight"][3, 4] += 1
    save_file(different, source)
    with pytest.raises(ValueError, match=r"'one.weight' and 'two.weight' are one parameter of the model, and differ"):
        gp.reconstruct_file(lambda: Twice(), source, tmp_path / "other", SIGNALS, sparsity=0.5)


# ------------------------------------------------------------------------------------------------- little at a time


def test_a_model_is_made_without_memory_for_its_parameters_and_with_its_buffers():
    register = nn.Module.register_parameter
    model = made_without_values(llama)
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(model.model.rotary_emb.inv_freq, llama().model.rotary_emb.inv_freq)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert nn.Module.register_parameter is register


def test_one_block_at_a_time_is_in_memory(tmp_path, monkeypatch):
    source, seen = stored(seeded(llama), tmp_path / "source"), []
    finish = Stored.finish

    def look(self, done):
        seen.append((done, {id(p) for p in self._held}))
        finish(self, done)

    monkeypatch.setattr(Stored, "finish", look)
    model = made_without_values(llama)
    monkeypatch.setattr(Stored, "attached", kept(Stored.attached, blocks := []))
    gp.reconstruct_file(model, source, tmp_path / "out", TOKENS, sparsity=0.5)
    assert len(seen) == 12
    for done, held in seen:
        block = blocks[int(done[0].split(".")[2])]
        assert held == block


def kept(attached, blocks):
    """`attached` that notes what parameters each block has while it lasts."""

    @contextlib.contextmanager
    def noting(self, model):
        with attached(self, model):
            blocks.extend({id(p) for p in block.parameters()} for block in model.model.layers)
            yield

    return noting


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_below_the_size_of_the_model(tmp_path):
    """In a process of its own, beyond what it took before."""
    code = """
import os, sys, torch
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = sys.argv[1:3]
import gradprune as gp
from record import PeakMemory
import transformers as tr
torch.set_num_threads(1)
config = tr.LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=24, num_attention_heads=4,
                        vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2)
make = lambda: tr.LlamaForCausalLM(config)
folder = sys.argv[3]
if sys.argv[4] == "make":
    make().save_pretrained(folder + "/source", max_shard_size="20MB")
else:
    tokens = [{"input_ids": torch.randint(3, 96, (4, 64))} for _ in range(2)]
    warm = tr.LlamaConfig(**config.to_dict() | {"num_hidden_layers": 2})
    small = tr.LlamaForCausalLM(warm)
    gp.reconstruct_(small, tokens, sparsity=0.5, solve="one pass", exclude="lm_head*")
    with PeakMemory() as memory:
        gp.reconstruct_file(make, folder + "/source", folder + "/out", tokens, sparsity=0.5, solve="one pass",
                            exclude="lm_head*")
    size = sum(os.path.getsize(f"{folder}/source/{n}") for n in os.listdir(folder + "/source"))
    print(memory.extra / size)
"""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-W", "ignore", "-c", code, str(root / "src"), str(root / "tests" / "bench")]
    subprocess.run([*command, str(tmp_path), "make"], check=True, capture_output=True)
    done = subprocess.run([*command, str(tmp_path), "prune"], check=True, capture_output=True, text=True)
    assert float(done.stdout.splitlines()[-1]) < 1 / 3


def test_no_block_runs_for_a_second_batch_before_the_first_is_pruned(tmp_path, monkeypatch):
    source, calls = stored(seeded(gpt2), tmp_path / "source"), []
    advance = replay.Passes.advance

    def begin(self, name):
        calls.append("pruning")
        advance(self, name)

    monkeypatch.setattr(replay.Passes, "advance", begin)
    block = type(seeded(gpt2).transformer.h[0])
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda self, *a, **k: (calls.append("block"), forward(self, *a, **k))[1])
    gp.reconstruct_file(gpt2, source, tmp_path / "out", TOKENS, sparsity=0.5)
    assert calls.index("pruning") == 3


class Sliding(nn.Module):
    """Blocks of two kinds, which get different masks where a batch has one."""

    def __init__(self, sizes=(12, 12, 12, 12)):
        super().__init__()
        self.blocks = nn.ModuleList(Scaled(a, b) for a, b in zip((12, *sizes), sizes, strict=False))

    def forward(self, x, mask=None):
        masks = (None, None) if mask is None else (mask, 1 - mask)
        for i, block in enumerate(self.blocks):
            x = block(x, masks[i % 2])
        return x


class Scaled(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, x, mask):
        hidden = torch.relu(self.layer(x))
        return hidden if mask is None else hidden * mask


X = torch.randn(200, 12, generator=torch.Generator().manual_seed(1)) + 0.5
MASK = (torch.arange(12) % 2).float()


@pytest.mark.parametrize(
    ("make", "batches", "chain"),
    [
        (Sliding, [{"x": X}, {"x": X.flip(0)}], True),
        (Sliding, [{"x": X}, {"x": X.flip(0), "mask": MASK}], False),
        (lambda: Sliding((16, 8, 4)), [{"x": X}, {"x": X.flip(0)}], True),
    ],
)
def test_blocks_that_hand_on_what_they_are_given_tell_whether_they_are_a_chain(make, batches, chain, tmp_path):
    model = seeded(make)
    layers = gp.recovery.reconstruct.Request.of(model).layers
    with torch.no_grad():
        once, all_of_it = (replay.look(model, batches, layers, once=once) for once in (True, False))
    assert (once[1] is not None, once[0]) == (chain, all_of_it[0])
    assert "forward" not in vars(model.blocks[0])
    assert not model.blocks[-1]._forward_hooks
    gp.reconstruct_file(lambda: make(), stored(model, tmp_path / "source"), tmp_path / "out", batches, sparsity=0.5)
    gp.reconstruct_(model, batches, sparsity=0.5)
    assert same(loaded(tmp_path / "out"), dict(model.state_dict()))


# ------------------------------------------------------------------------------------------------ killed and repeated

KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[1:3]
import test_reconstruct_file as t
from gradprune.recovery.stored import Stored
finish, left = Stored.{where}, [{after}]
def killed(self, *given):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return finish(self, *given)
Stored.{where} = killed
t.gp.reconstruct_file(t.llama, t.Path(sys.argv[3]), t.Path(sys.argv[4]), t.TOKENS, sparsity=0.5)
"""


@pytest.mark.parametrize(("where", "after"), [("finish", 5), ("write", 9)])
@pytest.mark.parametrize("shards", [False, True], ids=["file", "shards"])
def test_a_call_that_was_killed_goes_on_where_it_was_and_comes_to_the_same_bits(
    where, after, shards, tmp_path, monkeypatch
):
    source = stored(seeded(llama), tmp_path / "source", shards=shards)
    gp.reconstruct_file(llama, source, tmp_path / "wanted", TOKENS, sparsity=0.5)
    here = Path(__file__).parent
    paths = [str(here.parents[1] / "src"), str(here), str(source), str(tmp_path / "out")]
    code = KILLED.format(where=where, after=after)
    killed = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *paths], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.unfinished").exists()
    written, write = [], Stored.write
    monkeypatch.setattr(Stored, "write", lambda self, w, *given: (written.append(w.name), write(self, w, *given))[1])
    done = gp.reconstruct_file(llama, source, tmp_path / "out", TOKENS, sparsity=0.5)
    assert len(written) == {"finish": 21 - 10, "write": 21 - 7}[where]
    assert set(written) < set(done.layers)
    assert same(loaded(tmp_path / "out"), loaded(tmp_path / "wanted"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source", "wanted"]


class Stop(Exception):
    pass


def interrupted(monkeypatch, call, *, after, error=KeyboardInterrupt):
    finish, left = Stored.finish, [after]

    def stop(self, done):
        finish(self, done)
        left[0] -= 1
        if not left[0]:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(Stored, "finish", stop)
        with pytest.raises(error):
            call()


def test_an_interrupted_call_changes_nothing_and_when_repeated_warns_of_all(tmp_path, monkeypatch):
    model = made_without_values(llama)
    source = stored(seeded(llama), tmp_path / "source")
    before, few = loaded(source), [{"input_ids": TOKENS[0]["input_ids"][:1]}]
    (tmp_path / "out").write_text("what stood there")
    hooks = [len(m._forward_hooks) for m in model.modules()]
    parameters = dict(model.named_parameters())

    def call():
        return gp.reconstruct_file(model, source, tmp_path / "out", few, sparsity=0.5)

    interrupted(monkeypatch, call, after=4)
    assert same(loaded(source), before)
    assert (tmp_path / "out").read_text() == "what stood there"
    assert all(model.get_parameter(n) is p for n, p in parameters.items())
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    with pytest.warns(UserWarning, match=r"fewer inputs than columns.*'model.layers.0.*and 18 more"):
        call()
    with pytest.warns(UserWarning, match="fewer inputs"):
        gp.reconstruct_file(model, source, tmp_path / "wanted", few, sparsity=0.5)
    assert same(loaded(tmp_path / "out"), loaded(tmp_path / "wanted"))


def test_a_call_that_was_stopped_when_all_was_pruned_ends(tmp_path, monkeypatch):
    source = stored(seeded(llama), tmp_path / "source", shards=True)
    call = lambda: gp.reconstruct_file(llama, source, tmp_path / "out", TOKENS, sparsity=0.5)  # noqa: E731
    interrupted(monkeypatch, call, after=12)
    monkeypatch.setattr(Stored, "write", lambda *_: pytest.fail("nothing is left to prune"))
    assert call().sparsity == 0.5
    assert (tmp_path / "out").is_dir()


def test_what_stands_there_after_the_output_took_its_place_is_not_taken_for_a_beginning(tmp_path, monkeypatch):
    source = stored(seeded(two_layers), tmp_path / "source")
    call = lambda: gp.reconstruct_file(two_layers, source, tmp_path / "out", SIGNALS, sparsity=0.5)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            call()
    wanted = loaded(tmp_path / "out")
    call()
    assert same(loaded(tmp_path / "out"), wanted)
    assert not (tmp_path / "out.unfinished").exists()


def rewritten(source):
    tensors = loaded(source)
    save_file({n: t + 1 if t.is_floating_point() else t for n, t in tensors.items()}, source)
    return {}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda _: {"sparsity": 0.6}, "the layers, or how many of their weights stay, differ"),
        (lambda _: {"exclude": "*down_proj*"}, "the layers, or how many of their weights stay, differ"),
        (lambda _: {"damp": 0.02}, "solve and damp differ"),
        (lambda _: {"solve": "one pass"}, "solve and damp differ"),
        (lambda _: {"batches": TOKENS[:2]}, "the batches differ"),
        (rewritten, "the checkpoints differ"),
        (lambda _: {"model": lambda: llama(tied=False, hidden_act="gelu")}, "the models differ"),
    ],
)
def test_what_was_begun_by_another_call_is_refused(other, words, tmp_path, monkeypatch):
    source = stored(seeded(lambda: llama(tied=False)), tmp_path / "source")
    how = {"model": lambda: llama(tied=False), "batches": TOKENS, "sparsity": 0.5, "exclude": "lm_head*"}
    interrupted(
        monkeypatch, lambda: gp.reconstruct_file(source=source, target=tmp_path / "out", **how), after=3, error=Stop
    )
    begun = names(tmp_path)
    with pytest.raises(ValueError, match=f"out.unfinished' is of another call: {words}. Repeat that call, or delete"):
        gp.reconstruct_file(source=source, target=tmp_path / "out", **how | other(source))
    assert names(tmp_path) == begun


def test_a_folder_of_somebody_else_is_not_written_to(tmp_path):
    source = stored(seeded(two_layers), tmp_path / "source")
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "letter").write_text("mine")
    with pytest.raises(ValueError, match=r"out.unfinished' is needed to write 'out': move away what is there"):
        gp.reconstruct_file(two_layers, source, tmp_path / "out", SIGNALS, sparsity=0.5)
    assert names(tmp_path / "out.unfinished") == ["letter"]


# ------------------------------------------------------------------------------------------------------------ refused


def with_a_meta_buffer():
    with torch.device("meta"):
        return llama()


def without(tensors, name):
    return {n: t for n, t in tensors.items() if n != name}


@pytest.mark.parametrize(
    ("model", "change", "error", "words"),
    [
        (lambda: seeded(llama), dict, TypeError, "has values, on cpu: give a function that makes the model"),
        (with_a_meta_buffer, dict, ValueError, "buffer 'model.rotary_emb.inv_freq' is not stored with the model"),
        (lambda: llama, lambda t: without(t, "model.norm.weight"), ValueError, "has no 'model.norm.weight'"),
        (lambda: llama, lambda t: without(t, "model.embed_tokens.weight"), ValueError, "and no parameter tied to it"),
        (lambda: llama, lambda t: t | {"model.norm.weight": torch.ones(31)}, ValueError, r"F32 of shape \(31,\) in"),
        (lambda: llama, lambda t: t | {"model.norm.weight": torch.ones(32).int()}, ValueError, "is I32 of shape"),
        (lambda: llama, lambda t: {n: v * float("nan") for n, v in t.items()}, ValueError, "contains NaN"),
        (lambda: lambda: None, dict, TypeError, r"what model\(\) makes must be a torch.nn.Module"),
        (lambda: 3, dict, TypeError, "model must be a function, got 3"),
    ],
)
def test_what_does_not_go_together_is_refused(model, change, error, words, tmp_path):
    source = stored(seeded(llama), tmp_path / "source")
    save_file(change(load_file(source)), source)
    before = source.read_bytes()
    with pytest.raises(error, match=words):
        gp.reconstruct_file(model(), source, tmp_path / "out", TOKENS, sparsity=0.5)
    assert source.read_bytes() == before
    assert not (tmp_path / "out").exists()


def test_a_pickled_checkpoint_is_refused(tmp_path):
    torch.save(two_layers().state_dict(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="was pickled: save its tensors with safetensors"):
        gp.reconstruct_file(two_layers, tmp_path / "a.pt", tmp_path / "out", SIGNALS, sparsity=0.5)


def test_tensors_that_the_model_has_not_are_copied_and_that_is_said(tmp_path):
    source = stored(seeded(two_layers), tmp_path / "source")
    save_file(load_file(source) | {"more": torch.arange(5), "other": torch.ones(2)}, source)
    with pytest.warns(UserWarning, match="has 'more' and 1 more, which the model has not: copied as it is"):
        gp.reconstruct_file(two_layers, source, tmp_path / "out", SIGNALS, sparsity=0.5)
    assert torch.equal(loaded(tmp_path / "out")["more"], torch.arange(5))


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    source = stored(seeded(two_layers), tmp_path / "source")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(OSError, match="no room for"):
        gp.reconstruct_file(two_layers, source, tmp_path / "out", SIGNALS, sparsity=0.5)
    assert names(tmp_path) == ["source", "source/model.safetensors"]


def test_a_source_that_changes_meanwhile_is_an_error(tmp_path, monkeypatch):
    source = stored(seeded(two_layers), tmp_path / "source")
    note = Resumed.note

    def touched(self, done):
        note(self, done)
        os.utime(source, ns=(1, 1))

    monkeypatch.setattr(Resumed, "note", touched)
    with pytest.raises(OSError, match="was written while it was read"):
        gp.reconstruct_file(two_layers, source, tmp_path / "out", SIGNALS, sparsity=0.5)
    assert not (tmp_path / "out").exists()


def test_nothing_to_prune_is_a_copy(tmp_path):
    source = stored(seeded(llama), tmp_path / "source")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = gp.reconstruct_file(llama, source, tmp_path / "out", TOKENS, sparsity=0.0)
    assert (tmp_path / "out").read_bytes() == source.read_bytes()
    assert done.sparsity == 0
