"""A checkpoint is a file, a folder of shards or a state dict; what is none, or not whole, is refused."""

import json
import os
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gradprune.core.checkpoint import Memory, opened, pieces


def values(checkpoint, name):
    part, entry = checkpoint.tensors[name]
    return b"".join(raw.tobytes() for _, raw in pieces(checkpoint.tensors[name], 8)), part.name, entry.shape


def sharded(folder, weight_map=None):
    folder.mkdir()
    save_file({"a": torch.arange(4.0), "b": torch.ones(2)}, folder / "model-1.safetensors")
    save_file({"c": torch.zeros(3, 1)}, folder / "model-2.safetensors")
    where = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map or where}))
    (folder / "config.json").write_text('{"model_type": "none"}')
    (folder / "pytorch_model.bin").write_bytes(b"the same again")
    return folder


@pytest.mark.parametrize("given", ["", "model.safetensors.index.json"])
def test_shards_are_one_checkpoint_by_their_folder_or_their_index(tmp_path, given):
    with opened(sharded(tmp_path / "m") / given) as found:
        assert list(found.tensors) == ["a", "b", "c"]
        assert values(found, "a") == (torch.arange(4.0).numpy().tobytes(), "model-1.safetensors", (4,))
        assert values(found, "c")[1] == "model-2.safetensors"
        assert found.config() == {"model_type": "none"}
        assert [path.name for path in found.beside()] == ["config.json"]


def test_a_file_is_read_wherever_it_is_and_a_folder_with_one_too(tmp_path):
    save_file({"a": torch.arange(4.0)}, tmp_path / "x")
    with opened(str(tmp_path / "x")) as found:
        assert found.folder is None
    os.rename(tmp_path / "x", tmp_path / "x.safetensors")
    with opened(tmp_path) as found:
        assert found.folder == tmp_path
        assert list(found.tensors) == ["a"]


INDICES = {
    "a shard that is not there": ({"a": "model-9.safetensors"}, FileNotFoundError, "names the file 'model-9"),
    "another folder": ({"a": "../m/model-1.safetensors"}, ValueError, "a file that it names is none of its folder"),
    "a wrong shard": (
        {"a": "model-2.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"},
        ValueError,
        "it says that 'a' is in 'model-2.safetensors', which does not have it",
    ),
    "a tensor too few": (
        {"a": "model-1.safetensors", "c": "model-2.safetensors"},
        ValueError,
        "it does not name 'b', which 'model-1.safetensors' has",
    ),
    "no files": ({"a": 3}, ValueError, "a file that it names is none of its folder"),
    "a list": ([3], ValueError, "it has no weight_map"),
}


@pytest.mark.parametrize("case", INDICES)
def test_an_index_that_does_not_fit_is_refused(tmp_path, case):
    weight_map, error, says = INDICES[case]
    with pytest.raises(error, match=re.escape(says)):
        opened(sharded(tmp_path / "m", weight_map))


def test_a_damaged_shard_or_index_is_named(tmp_path):
    folder = sharded(tmp_path / "m")
    data = (folder / "model-2.safetensors").read_bytes()
    (folder / "model-2.safetensors").write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"'model-2.safetensors' is cut off"):
        opened(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=r"the index 'model.safetensors.index.json' is damaged"):
        opened(folder)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        opened(tmp_path / "none")
    with pytest.raises(TypeError, match="the checkpoint must be a path"):
        opened(3)
    with pytest.raises(ValueError, match=r"holds no safetensors file"):
        opened(tmp_path)
    torch.save({}, tmp_path / "m.bin")
    with pytest.raises(ValueError, match=r"holds no safetensors file; 'm.bin' is one that torch.save wrote: name it"):
        opened(tmp_path)
    for name in "ab":
        save_file({"a": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"holds 2 checkpoints, a.safetensors, b.safetensors: name one"):
        opened(tmp_path)


# ------------------------------------------------------------------------------------------------------------ pickles


def test_a_state_dict_is_read_without_running_code(tmp_path):
    model = nn.Linear(3, 2)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    with opened(tmp_path / "m.pt") as found:
        assert values(found, "weight")[0] == model.weight.detach().numpy().tobytes()
        assert found.parts[0].name == "m.safetensors"


class Runs:
    def __reduce__(self):
        return (os.mkdir, ("was run",))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            nn.Linear(2, 2),
            "it holds more than tensors, torch.nn.modules.linear.Linear, and reading it could run code. ",
        ),
        ({"a": Runs()}, "and reading it could run code. "),
        ([torch.ones(2)], "it holds a list, no state dict"),
        (torch.ones(2), "it holds a Tensor, no state dict"),
        (
            {"epoch": 3, "model": {"a": torch.ones(2)}},
            "'epoch' in it is of type int, no tensor; its 'model' may be the state dict: save that alone",
        ),
    ],
)
def test_a_pickle_of_anything_else_is_refused_with_the_reason(tmp_path, monkeypatch, content, says):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=re.escape(says)) as refused:
        opened(tmp_path / "m.pt")
    assert str(refused.value).isprintable()  # torch's own is for a terminal, in bold
    assert not (tmp_path / "was run").exists()


def test_a_damaged_pickle_is_refused(tmp_path):
    torch.save({"a": torch.ones(100)}, tmp_path / "m.pt")
    data = (tmp_path / "m.pt").read_bytes()
    for wrong in (data[:-200], b"", b"text", b"PK"):
        (tmp_path / "m.pt").write_bytes(wrong)
        with pytest.raises(ValueError, match=r"'m.pt' cannot be read"):
            opened(tmp_path / "m.pt")


# ---------------------------------------------------------------------------------------------------- tensors in memory


def test_tensors_in_memory_read_as_their_file_would():
    tensors = {
        "turned": torch.arange(6.0).view(2, 3).T,
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "empty": torch.empty(0, 2),
    }
    part = Memory("m", tensors | {"again": tensors["turned"]}, {"format": "pt"})
    assert part.header.metadata == {"format": "pt", "again": "turned"}
    for name, tensor in tensors.items():
        entry = part.header.entries[name]
        found = b"".join(part.read(entry, i, min(i + 3, entry.nbytes)).tobytes() for i in range(0, entry.nbytes, 3))
        assert found == tensor.resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_tensor_that_no_file_holds_is_refused_by_name():
    with pytest.raises(ValueError, match="'a' is sparse or quantized"):
        Memory("m", {"a": torch.ones(2, 2).to_sparse()}, {})
    with pytest.raises(ValueError, match=r"'a' is torch.complex128"):
        Memory("m", {"a": torch.ones(2, 2, dtype=torch.complex128)}, {})


def test_a_file_that_is_written_while_it_is_read_is_noticed(tmp_path):
    save_file({"a": torch.ones(4)}, tmp_path / "m.safetensors")
    with opened(tmp_path / "m.safetensors") as found:
        with open(tmp_path / "m.safetensors", "ab") as file:
            file.write(b"more")
        with pytest.raises(OSError, match=r"'m.safetensors' was written while it was read"):
            found.parts[0].check()
