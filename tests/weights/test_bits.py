"""Masks come back from a state and a file as they were; what holds none is refused by what it is not."""

import math
import re

import pytest
import torch
from torch import nn

import gradprune as gp


def byte(count=1):
    return torch.ones(count, dtype=torch.uint8)


WRONG_STATES = {
    "None": (None, TypeError, "a state of Masks must be a dict"),
    "a list": ([], TypeError, "a state of Masks must be a dict"),
    "a model": (nn.Linear(2, 2), TypeError, "a state of Masks must be a dict"),
    "a model's state": (
        nn.Linear(2, 2).state_dict(),
        ValueError,
        "the mask of 'weight' must be a bool tensor, got torch.float32",
    ),
    "masks and bits": (
        {"a": torch.ones(2, dtype=torch.bool), "b": {"bits": byte(), "shape": (8,)}},
        TypeError,
        "mask of 'a' must be a dict of bits and shape",
    ),
    "an empty entry": ({"a": {}}, ValueError, "lacks 'bits', 'shape'"),
    "no shape": ({"a": {"bits": byte()}}, ValueError, "lacks 'shape'"),
    "no tensor": ({"a": {"bits": [1], "shape": (1,)}}, ValueError, "'bits' in the state of Masks must be Tensor"),
    "floats": ({"a": {"bits": torch.ones(1), "shape": (1,)}}, ValueError, "needs 1 bytes for shape"),
    "a shape of text": ({"a": {"bits": byte(), "shape": "8"}}, ValueError, "'shape' in the state of Masks must be"),
    "a wrong shape": ({"a": {"bits": byte(), "shape": (3, 3)}}, ValueError, "needs 2 bytes for shape"),
    "too many bits": ({"a": {"bits": byte(2), "shape": (3,)}}, ValueError, "needs 1 bytes for shape"),
    "negative sizes": ({"a": {"bits": byte(), "shape": (-2, -4)}}, ValueError, "the shape of the mask of 'a' must be"),
    "broken sizes": ({"a": {"bits": byte(), "shape": (2.5,)}}, ValueError, "the shape of the mask of 'a' must be"),
    "nan": ({"a": {"bits": byte(), "shape": (math.nan,)}}, ValueError, "the shape of the mask of 'a' must be"),
    "text sizes": ({"a": {"bits": byte(), "shape": ("8",)}}, TypeError, "the shape of the mask of 'a' must be"),
    "bools": ({"a": {"bits": byte(), "shape": (True,)}}, TypeError, "the shape of the mask of 'a' must be"),
    "a number for a name": ({1: {"bits": byte(), "shape": (8,)}}, TypeError, "the names of masks must be text, got 1"),
}


@pytest.mark.parametrize("kind", WRONG_STATES)
def test_a_state_of_something_else_is_refused_by_what_it_lacks(kind):
    state, error, says = WRONG_STATES[kind]
    with pytest.raises(error, match=says):
        gp.Masks.from_state_dict(state)


def test_bool_tensors_by_name_are_masks_already():
    masks = {"a": torch.tensor([True, False])}
    assert gp.Masks.from_state_dict(masks) == gp.Masks(masks)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(1, 1, dtype=torch.bool).expand(5, 7),
        (torch.rand(7, 5) < 0.5).T,
        (torch.rand(3, 4, 5, 6) < 0.5).to(memory_format=torch.channels_last),
        (torch.rand(9, 9) < 0.5)[::2, 1::3],
        nn.Parameter(torch.rand(3, 3) < 0.5, requires_grad=False),
    ],
    ids=["expanded", "transposed", "channels last", "strided", "a parameter"],
)
def test_masks_of_any_layout_come_back_the_same(mask, tmp_path):
    masks = gp.Masks({"w": mask})
    masks.save(tmp_path / "m")
    assert gp.Masks.load(tmp_path / "m") == masks == gp.Masks.from_state_dict(masks.state_dict())


def test_the_defaults_of_torch_do_not_reach_masks(tmp_path):
    masks = gp.Masks({"w": torch.rand(5, 5) < 0.5})
    model = nn.Linear(5, 5)
    renamed = gp.Masks({"weight": masks["w"]})
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float16)
    try:
        masks.save(tmp_path / "m")
        again = gp.Masks.load(tmp_path / "m")
        zero = renamed.apply_(model).holds(model)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert again["w"].device.type == "cpu"
    assert again == masks
    assert zero
    assert bool((model.weight.detach()[~masks["w"]] == 0).all())


def test_a_file_that_names_a_mask_it_does_not_hold_is_refused(tmp_path):
    from safetensors.torch import save_file

    for told in ('{"a": [8], "b": [8]}', "[8]", "8", "null"):
        save_file({"a": byte()}, tmp_path / "m", metadata={"gradprune.masks": told})
        with pytest.raises(ValueError, match="'m' is no file of masks: it lacks tensors that it names"):
            gp.Masks.load(tmp_path / "m")


def test_where_no_file_can_be_is_said_before_anything_is_written(tmp_path):
    masks = gp.Masks({"w": torch.ones(3, dtype=torch.bool)})
    for path, error, says in (
        (tmp_path, ValueError, "path is a folder"),
        (tmp_path / "no" / "m", ValueError, "folder that does not exist"),
        (None, TypeError, "path must be a path"),
        (3, TypeError, "path must be a path"),
    ):
        with pytest.raises(error, match=says):
            masks.save(path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="there is no file"):
        gp.Masks.load(tmp_path / "m")
    with pytest.raises(ValueError, match="it is a folder"):
        gp.Masks.load(tmp_path)


def test_a_pickle_of_masks_is_refused_with_the_way_that_reads_it(tmp_path):
    path, masks = tmp_path / "masks.pt", gp.Masks({"a": torch.tensor([True, False])})
    torch.save(masks.state_dict(), path)
    way = "Masks.from_state_dict(torch.load(path, weights_only=True))"
    with pytest.raises(ValueError, match=r"'masks\.pt' is no file of masks: it is a pickle.*" + re.escape(way)):
        gp.Masks.load(path)
    assert eval(way, {"Masks": gp.Masks, "torch": torch, "path": path}) == masks
    assert way in gp.Masks.load.__doc__
