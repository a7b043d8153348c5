"""What do the live figures have in common: a network that the page holds, and a picture for where no script runs?"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import torch
import traitlets
from matplotlib.figure import Figure
from torch import Tensor, nn

import gradprune as gp
from gradprune.lab import figures
from gradprune.lab.data import Split

_SHEET = Path(__file__).with_name("live.css").read_text(encoding="utf-8")
_COLOURS = "".join(f"--gp-{name}:{colour};" for name, colour in figures.COLOURS.items())


@dataclass(frozen=True)
class Still:
    """What stands for a live figure where no script runs: a picture of one setting, its words, and a table."""

    figure: Figure
    words: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Live(anywidget.AnyWidget):
    """A figure that computes in the reader's browser: in the built page from disk, in a notebook beside its kernel.

    A subclass sets `_esm` to its joined modules, has a trait for each thing that the reader sets or reads, and says in
    `still` what it shows at its first setting.
    """

    _css = f".gp-live{{{_COLOURS}}}\n{_SHEET}"
    accuracy = traitlets.Float(
        None, allow_none=True, help="the share of the test examples read correctly, as the page last showed it"
    ).tag(sync=True)

    def still(self) -> Still:
        """Return the picture, the words and the table of the first setting, computed by gradprune."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        bundle, _ = super()._repr_mimebundle_(**kwargs) or ({}, {})
        still = self.still()
        rows = [list(still.header), *([figures.cell(value) for value in row] for row in still.rows)]
        bundle["text/plain"] = "\n".join([still.words, *figures.aligned(rows)])
        bundle["image/png"] = base64.b64encode(figures.to_png(still.figure)).decode()
        if figures.for_page():
            bundle["text/html"] = _page(still, rows)
        return bundle, {"image/png": {"alt": still.words}}


def _page(still: Still, rows: Sequence[Sequence[str]]) -> str:
    """The still as HTML, for a page whose scripts do not run."""
    words = f'<p class="gp-words">{html.escape(still.words)}</p>'
    picture = figures.to_svg(still.figure, still.words)
    return f'<div class="gp-live gp-still">{words}{picture}{figures.html_table(rows)}</div>'


def pack_network(model: nn.Sequential, activation: str) -> dict[str, Any]:
    """Return a perceptron as the page reads it: the widths, the activation, all numbers in torch's order, float32.

    Raises ValueError where the model has layers with parameters other than nn.Linear with a bias.
    """
    layers = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    for layer in layers:
        if not isinstance(layer, nn.Linear) or layer.bias is None:
            raise ValueError(f"the page knows nn.Linear with a bias, not {layer}")
    sizes = [layers[0].in_features, *(layer.out_features for layer in layers)]
    return {"sizes": sizes, "activation": activation, "numbers": floats(*model.parameters())}


def unpack_network_(model: nn.Module, numbers: bytes) -> nn.Module:
    """Fill the parameters of `model`, in order, with `numbers` as the page keeps them; return the model.

    Raises ValueError where the count differs.
    """
    values = np.frombuffer(numbers, dtype="<f4")
    total = sum(parameter.numel() for parameter in model.parameters())
    if len(values) != total:
        raise ValueError(f"the network has {total} numbers, the page gave {len(values)}")
    nn.utils.vector_to_parameters(next(model.parameters()).new_tensor(values.copy()), model.parameters())
    return model


def unpack_masks(like: gp.Masks, kept: bytes) -> gp.Masks:
    """Return masks of the names and shapes of `like` from what the page keeps: a byte an entry, mask after mask."""
    flat = torch.from_numpy(np.frombuffer(kept, dtype=np.uint8).astype(bool))
    parts = flat.split([mask.numel() for mask in like.values()])
    return gp.Masks({name: part.view_as(mask) for (name, mask), part in zip(like.items(), parts, strict=True)})


def pack_split(split: Split) -> dict[str, Any]:
    """Return examples as the page reads them, without loss: a byte a value where they have at most 256 levels (pixels).

    `levels` are the distinct values, float32, and `codes` says which; or `values` has them all.
    """
    packed: dict[str, Any] = {"rows": len(split), "labels": split.y.numpy().astype(np.uint8).tobytes()}
    levels, codes = np.unique(split.x.numpy(), return_inverse=True)
    if len(levels) > 256:
        return packed | {"values": floats(split.x)}
    return packed | {"levels": levels.astype("<f4").tobytes(), "codes": codes.astype(np.uint8).tobytes()}


def floats(*tensors: Tensor) -> bytes:
    """Return the numbers of tensors, one after the other, as float32 in little-endian order."""
    return b"".join(tensor.detach().cpu().numpy().astype("<f4").tobytes() for tensor in tensors)


def halves(*tensors: Tensor) -> bytes:
    """Return the numbers of tensors, one after the other, in half precision and little-endian order."""
    return b"".join(tensor.detach().cpu().numpy().astype("<f2").tobytes() for tensor in tensors)
