"""What is packed is unpacked bit for bit, smaller where that can be, and nothing else is taken for it."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file, save_file
from torch import nn

import gradprune as gp
from gradprune.core import checkpoint
from gradprune.deploy import pack

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2, torch.int64, torch.bool]


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def sparse(*shape, dtype=torch.float32, density=0.2):
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(shape, generator=generator) < density
    return (torch.randn(shape, generator=generator) * kept).to(dtype)


def digits():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 100), nn.BatchNorm1d(100), nn.Linear(100, 10))
    gp.prune(model, sparsity=0.9, scope="layer")
    return model


# -------------------------------------------------------------------------------------------------------- bit for bit


@settings(max_examples=80)
@given(
    data=hnp.arrays(
        "u1", hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9), elements=st.integers(0, 255)
    ),
    dtype=st.sampled_from(DTYPES),
    zeros=st.sampled_from([0, 1, 2, 50]),
    step=st.sampled_from([8, 16, 2**18]),
)
def test_any_bits_come_back(data, dtype, zeros, step, tmp_path_factory):
    """Among them NaN with any payload, infinities, both zeros."""
    folder = tmp_path_factory.mktemp("any")
    raw = torch.from_numpy(data).reshape(-1).repeat_interleave(dtype.itemsize)
    raw[: raw.numel() * zeros // 51 // dtype.itemsize * dtype.itemsize] = 0
    tensor = raw.bool() if dtype == torch.bool else raw.view(dtype)
    tensor = tensor.view(data.shape)
    save_file({"a": tensor, "b": torch.tensor([-0.0, 0.0, float("nan")])}, folder / "m", metadata={"x": "ü"})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pack, "STEP", step)
        done = gp.pack(folder / "m", folder / "p")
        found = gp.unpack(folder / "p")
        gp.unpack(folder / "p", folder / "again")
    assert same_bits(found["a"], tensor)
    assert (folder / "again").read_bytes() == (folder / "m").read_bytes()
    assert done.bytes_after == (folder / "p").stat().st_size
    assert done.bytes_before == (folder / "m").stat().st_size


def test_the_negative_zero_is_a_value_and_stays(tmp_path):
    weight = torch.zeros(4, 16)
    weight[1, 3], weight[2, 5] = -0.0, float("nan")
    save_file({"w": weight}, tmp_path / "m")
    gp.pack(tmp_path / "m", tmp_path / "p")
    stored = load_file(tmp_path / "p")
    assert stored["w:values"].shape == (2,)
    assert stored["w:bits"].tolist() == [0, 0, 0b00010000, 0, 0b00000100, 0, 0, 0]
    assert same_bits(gp.unpack(tmp_path / "p")["w"], weight)


def test_the_format_is_what_it_is_said_to_be(tmp_path):
    save_file({"w": sparse(32, 32), "dense": torch.ones(3, 3)}, tmp_path / "m", metadata={"format": "pt"})
    done = gp.pack(tmp_path / "m", tmp_path / "p")
    with checkpoint.opened(tmp_path / "p") as found:
        metadata = found.parts[0].header.metadata
        assert set(found.tensors) == {"w:bits", "w:values", "dense"}
        with checkpoint.opened(tmp_path / "m") as before:
            header = before.parts[0].header.text.decode()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["gradprune.pack"]) == {"version": 1, "header": header}
    assert (done.tensors, done.packed) == (2, 1)
    assert re.fullmatch(r"'.*p': 3.\d+ kB instead of 4.\d+ kB \(\d\d.\d%\); 1 of 2 tensors are packed", str(done))


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 33), (torch.bfloat16, 65), (torch.float64, 17)])
def test_a_tensor_is_packed_only_where_that_is_smaller(tmp_path, dtype, least):
    """One bit an entry is 1/32 of float32: with fewer zeros than that it stays as it is."""
    for zeros, packed in ((least - 1, 0), (least, 1)):
        weight = torch.ones(1024, dtype=dtype)
        weight[:zeros] = 0
        save_file({"w": weight}, tmp_path / "m")
        assert gp.pack(tmp_path / "m", tmp_path / "p").packed == packed


# ------------------------------------------------------------------------------------------------------------- models


def test_a_model_is_packed_and_its_twin_set(tmp_path):
    model = digits()
    done = gp.pack(model, tmp_path / "p.safetensors")
    assert done.bytes_after < 0.25 * done.bytes_before
    twin = nn.Sequential(nn.Linear(64, 100), nn.BatchNorm1d(100), nn.Linear(100, 10))
    assert gp.unpack(tmp_path / "p.safetensors", twin) is twin
    assert all(same_bits(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    found = gp.unpack(tmp_path / "p.safetensors")
    assert found.keys() == model.state_dict().keys()
    assert int(found["1.num_batches_tracked"]) == 0


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weights_are_stored_once_and_found_under_each_name(tmp_path):
    model, twin = Tied(), Tied()
    gp.pack(model, tmp_path / "p")
    with checkpoint.opened(tmp_path / "p") as found:
        assert len(found.tensors) == 1
    found = gp.unpack(tmp_path / "p")
    assert found["embed.weight"] is found["head.weight"]
    gp.unpack(tmp_path / "p", twin)
    assert twin.head.weight is twin.embed.weight
    assert same_bits(twin.head.weight, model.head.weight)
    save_file({"embed.weight": torch.ones(20, 8)}, tmp_path / "m")  # as save_pretrained leaves them out
    gp.pack(tmp_path / "m", tmp_path / "p")
    assert bool((gp.unpack(tmp_path / "p", twin).head.weight == 1).all())


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (lambda: nn.Sequential(nn.Linear(64, 100)), "has besides '1.num_batches_tracked', '1.bias'"),
        (lambda: nn.Sequential(*digits(), nn.Linear(10, 2)), "the file lacks '3.weight', '3.bias'"),
        (
            lambda: nn.Sequential(nn.Linear(64, 100), nn.BatchNorm1d(100), nn.Linear(100, 11)),
            r"'2.\w+' has shape .*, the model's has \(11",
        ),
    ],
)
def test_another_model_is_refused_and_left_as_it_was(tmp_path, other, says):
    gp.pack(digits(), tmp_path / "p")
    model = other()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=says):
        gp.unpack(tmp_path / "p", model)
    assert all(same_bits(t, before[name]) for name, t in model.state_dict().items())


# -------------------------------------------------------------------------------------------------------------- files


def shards(folder):
    folder.mkdir()
    save_file({"a": sparse(40, 40), "b": torch.ones(2)}, folder / "model-1.safetensors", metadata={"format": "pt"})
    save_file({"c": sparse(40, 40, dtype=torch.bfloat16)}, folder / "model-2.safetensors")
    where = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}, indent=3))
    (folder / "config.json").write_text("{}")
    return folder


def test_a_folder_comes_back_file_by_file_and_packed_goes_by_names_that_nobody_loads(tmp_path):
    shards(tmp_path / "m")
    done = gp.pack(tmp_path / "m", tmp_path / "p")
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == [
        "config.json",
        "model-1.packed.safetensors",
        "model-2.packed.safetensors",
        "model.packed.safetensors.index.json",
    ]
    assert (done.tensors, done.packed) == (3, 2)
    assert same_bits(gp.unpack(tmp_path / "p")["c"], sparse(40, 40, dtype=torch.bfloat16))
    assert gp.unpack(tmp_path / "p", tmp_path / "again") == tmp_path / "again"
    again = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert again == {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}


def test_what_torch_saved_is_packed(tmp_path):
    torch.save(digits().state_dict(), tmp_path / "m.pt")
    gp.pack(tmp_path / "m.pt", tmp_path / "p")
    assert all(same_bits(t, digits().state_dict()[name]) for name, t in gp.unpack(tmp_path / "p").items())


def packed_file(path):
    save_file({"w": sparse(32, 32)}, path.with_name("m"))
    gp.pack(path.with_name("m"), path)
    return load_file(path), json.loads(pack_told(path))


def pack_told(path):
    with checkpoint.opened(path) as found:
        return found.parts[0].header.metadata["gradprune.pack"]


DAMAGES = {
    "another version": (
        lambda t, told: (t, told | {"version": 3}),
        "in version 3; this gradprune reads up to 2",
    ),
    "no header": (lambda t, told: (t, {"version": 1}), "what its metadata says of 'gradprune.pack' cannot be read"),
    "a header of something else": (lambda t, told: (t, told | {"header": "[]"}), "the header of 'p' is damaged"),
    "no values": (lambda t, told: ({"w:bits": t["w:bits"]}, told), "'w' is not there, or not what it was"),
    "fewer bits": (lambda t, told: (t | {"w:bits": t["w:bits"][:-1]}, told), "'w' is not there, or not what it was"),
    "more ones": (lambda t, told: (t | {"w:bits": t["w:bits"] | 1}, told), "'w' has more bits than values"),
    "fewer ones": (lambda t, told: (t | {"w:bits": t["w:bits"] & 254}, told), "'w' has fewer bits than values"),
    "another dtype": (lambda t, told: (t | {"w:values": t["w:values"].double()}, told), "not what it was"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_packed_file_that_lies_is_refused_by_how(tmp_path, damage):
    change, says = DAMAGES[damage]
    tensors, told = change(*packed_file(tmp_path / "p"))
    save_file(tensors, tmp_path / "p", metadata={"gradprune.pack": json.dumps(told)})
    for into in (None, tmp_path / "out"):
        with pytest.raises(ValueError, match=says):
            gp.unpack(tmp_path / "p", into)
    assert not (tmp_path / "out").exists()


def test_what_is_not_packed_is_not_unpacked_and_what_is_not_packed_again(tmp_path):
    packed_file(tmp_path / "p")
    with pytest.raises(ValueError, match="'m' was not packed"):
        gp.unpack(tmp_path / "m")
    with pytest.raises(ValueError, match="'p' is packed already"):
        gp.pack(tmp_path / "p", tmp_path / "q")
    save_file({"w": torch.zeros(99), "w:bits": torch.ones(2)}, tmp_path / "m")
    with pytest.raises(ValueError, match="names of 'm' end in ':bits' or ':values' as packed ones do"):
        gp.pack(tmp_path / "m", tmp_path / "q")


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (
            lambda folder: gp.pack(3, folder / "p"),
            TypeError,
            "model_or_file must be a model or the path of a checkpoint",
        ),
        (lambda folder: gp.pack({"w": torch.ones(2)}, folder / "p"), TypeError, "must be a model or the path"),
        (lambda folder: gp.pack(nn.Linear(2, 2), 3), TypeError, "path must be a path"),
        (lambda folder: gp.pack(nn.Linear(2, 2), folder), ValueError, "path is a folder"),
        (lambda folder: gp.pack(nn.Linear(2, 2, device="meta"), folder / "p"), TypeError, "'weight' is on the meta"),
        (lambda folder: gp.pack(folder / "none", folder / "p"), FileNotFoundError, "there is no file or folder"),
        (lambda folder: gp.unpack(folder / "none"), FileNotFoundError, "there is no file or folder"),
        (lambda folder: gp.unpack(folder / "none", 3), TypeError, "into must be a model, a path or None, got int"),
    ],
)
def test_a_wrong_argument_is_refused(tmp_path, call, error, says):
    with pytest.raises(error, match=says):
        call(tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------- codes


@settings(max_examples=120)
@given(
    entries=st.integers(0, 300),
    density=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    distinct=st.sampled_from([0, 1, 2, 3, 16, 200]),
    dtype=st.sampled_from(DTYPES),
    code=st.sampled_from(["book", "entropy"]),
    seed=st.integers(0, 10**6),
)
def test_any_bits_come_back_through_a_code(entries, density, distinct, dtype, code, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (entries, dtype.itemsize), generator=generator, dtype=torch.uint8)
    if distinct and entries:
        raw = raw[torch.randint(0, min(distinct, entries), (entries,), generator=generator)]
    raw *= (torch.rand(entries, 1, generator=generator) < density).to(torch.uint8)
    tensor = (raw.view(-1) % 2).bool() if dtype == torch.bool else raw.view(-1).view(dtype)
    save_file({"a": tensor, "b": torch.tensor([-0.0, 0.0, float("nan")])}, folder / "m", metadata={"x": "ü"})
    done = gp.pack(folder / "m", folder / "p", code=code)
    assert done.bytes_after == (folder / "p").stat().st_size
    assert same_bits(gp.unpack(folder / "p")["a"], tensor)
    gp.unpack(folder / "p", folder / "again")
    assert (folder / "again").read_bytes() == (folder / "m").read_bytes()


def coded_bytes(model, folder, code):
    """The bytes of the tensors alone."""
    gp.pack(model, folder / "p", code=code)
    with checkpoint.opened(folder / "p") as found:
        return sum(t.entry.nbytes for name, t in found.tensors.items() if name.startswith("weight"))


def test_each_code_takes_the_bytes_that_theory_says(tmp_path):
    """Han et al. (2016): bits for the places, four for each of sixteen values; then the entropy of both."""
    torch.manual_seed(0)
    model = nn.Linear(1000, 200, bias=False)
    nn.init.normal_(model.weight)
    masks = gp.prune(model, sparsity=0.9)
    shared = gp.share_weights(model, 16)
    assert masks.holds(shared)
    bits = coded_bytes(model, tmp_path, "bits")
    assert bits == 25_000 + 80_000
    assert coded_bytes(model, tmp_path, "book") == pytest.approx(20_000 * (5 / 8 + 4), rel=0.05)  # gaps of five bits
    book = coded_bytes(shared, tmp_path, "book")
    assert book == pytest.approx(20_000 * (5 / 8 + 4 / 8), rel=0.05)
    _, counts = shared.weight[shared.weight != 0].unique(return_counts=True)
    share = counts.double() / 20_000
    values = -(share * share.log2()).sum().item() * 20_000 / 8
    places = -(0.1 * np.log2(0.1) + 0.9 * np.log2(0.9)) * 200_000 / 8
    entropy = coded_bytes(shared, tmp_path, "entropy")
    assert values + places < entropy < 1.03 * (values + places)
    assert entropy < book < bits
    assert same_bits(gp.unpack(tmp_path / "p")["weight"], shared.weight)


def test_a_quantized_network_is_coded_through_its_file(tmp_path):
    model = digits()
    small = gp.quantize(model.eval())
    gp.save(small, tmp_path / "q")
    plain, entropy = (gp.pack(tmp_path / "q", tmp_path / code, code=code) for code in ("bits", "entropy"))
    assert entropy.bytes_after < plain.bytes_after
    gp.unpack(tmp_path / "entropy", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "q").read_bytes()
    with pytest.raises(TypeError, match=r"'0\.weight' is quantized"):
        gp.pack(small, tmp_path / "p")


def told_otherwise(place, value):
    def lie(tensors, told):
        given = list(told["code"]["w"])
        given[place] = value(given[place])
        return tensors, told | {"code": {"w": given}}

    return lie


LIES = {
    "it ends early": lambda t, told: ({"w:coded": t["w:coded"][:-3]}, told),
    "it goes on": lambda t, told: ({"w:coded": torch.cat([t["w:coded"], t["w:coded"]])}, told),
    "a byte more among the places": lambda t, told: ({"w:coded": torch.cat([t["w:coded"][:1], t["w:coded"]])}, told),
    "it is empty": lambda t, told: ({"w:coded": t["w:coded"][:0]}, told),
    "more values": told_otherwise(0, lambda _: 10**6),
    "fewer values": told_otherwise(0, lambda _: 3),
    "another width": told_otherwise(1, lambda _: 9),
    "no list": told_otherwise(2, lambda _: 0),
    "fewer places": told_otherwise(4, lambda n: n - 1),
    "a negative length": told_otherwise(5, lambda _: -1),
    "no code": lambda t, told: (t, told | {"code": {}}),
    "text": lambda t, told: (t, told | {"code": {"w": "x"}}),
    "another header": lambda t, told: (t, told | {"header": "AAAA"}),
}


@pytest.mark.parametrize("code", ["book", "entropy"])
@pytest.mark.parametrize("lie", LIES)
def test_a_coded_file_that_lies_is_refused(lie, code, tmp_path):
    model = nn.Linear(40, 50)
    gp.prune(model, sparsity=0.9)
    weight = gp.share_weights(model, 5).weight.detach()
    save_file({"w": weight}, tmp_path / "m")
    gp.pack(tmp_path / "m", tmp_path / "p", code=code)
    with checkpoint.opened(tmp_path / "p") as found:
        told = json.loads(found.parts[0].header.metadata["gradprune.pack"])
    tensors, told = LIES[lie](load_file(tmp_path / "p"), told)
    save_file(tensors, tmp_path / "p", metadata={"gradprune.pack": json.dumps(told)})
    with pytest.raises(ValueError, match="'p' is damaged"):
        gp.unpack(tmp_path / "p")
    with pytest.raises(ValueError, match="'p' is damaged"):
        gp.unpack(tmp_path / "p", tmp_path / "out")
    assert not (tmp_path / "out").exists()
