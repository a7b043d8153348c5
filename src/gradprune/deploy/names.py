"""Which tensors of a checkpoint are weights, when there is no module to ask?

``weights.eligible`` asks the layers; a file has only names, shapes and, where a model of transformers lies in it, its
config.json. So these are rules about names, each with its reason in words; they are shown before anything is written,
and globs overrule them. Tests hold them against the layers of a dozen architectures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import nn

from gradprune.core.header import DTYPES, Entry
from gradprune.core.layers import Axes, Weight
from gradprune.weights.eligible import as_patterns

FLOATING = ("F64", "F32", "F16", "BF16")
# What is looked up, added or normalised, by the name of its module or its own.
_LOOKED_UP = re.compile(
    r"(^|_)(embed(ding)?s?|emb|wte|wpe|tokens?|pos|positions?|positional|codebook|shared|relative)(_|$)"
)
_NORM = re.compile(r"(^|_)(norm\d*|layer_?norm\d*|batch_?norm\d*|ln|bn|ln_?\w|rms_?norm)(_|$)|norm$")
_PARAMETRIZED = re.compile(r"(^|\.)parametrizations\.|(^|\.)weight_[gv]$|_(orig|mask)$")
_MATRIX = re.compile(r"(^|_)(weight|proj|kernel)(_|$)")
# Models of transformers whose linear layers are Conv1D, which stores [in, out], and what these layers are called.
_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_OF_CONV1D = {"c_attn", "c_proj", "c_fc", "q_attn"}
_HEADS = ("lm_head", "proj_out", "output", "embed_out")
_PACKED = re.compile(r"^(weight_[ih]h_l\d+\w*|in_proj_weight)$")
_GATES = "it packs the gates of a recurrent layer, or queries, keys and values. Exclude it, or prune single weights"


class Known(NamedTuple):
    """What is known of a tensor of a file."""

    entry: Entry
    reason: str = ""  # why it is no weight
    guessed: bool = False  # by its name alone
    axes: Axes | None = None  # which is the output; None where that is not known
    packed: str = ""  # why a row is no unit

    @property
    def weight(self) -> Weight:
        """The tensor as a parameter without values, for what asks after shapes and axes."""
        empty = torch.empty(self.entry.shape, dtype=DTYPES[self.entry.dtype], device="meta")
        parameter = nn.Parameter(empty, requires_grad=False)
        name, attribute = self.entry.name, self.entry.name.rpartition(".")[2]
        return Weight(name, (name,), parameter, nn.Module(), attribute, self.axes, self.packed)


def is_matrix(entry: Entry) -> bool:
    """Whether a tensor could be a weight, whatever it is called."""
    return entry.dtype in FLOATING and len(entry.shape) >= 2


def told_by_layers(entries: Iterable[Entry], weights: Mapping[str, Weight]) -> dict[str, Known]:
    """Return what the layers of the model say of each tensor, in the model's order."""
    order = {name: place for place, name in enumerate(weights)}
    found = {}
    for entry in sorted(entries, key=lambda entry: (order.get(entry.name, len(order)), in_order(entry.name))):
        reason, guessed = ("", False) if is_matrix(entry) else _reason(entry)
        weight = weights.get(entry.name)
        if weight is None or reason:
            found[entry.name] = Known(entry, reason or "is no parameter of the model")
            continue
        if tuple(weight.parameter.shape) != entry.shape:
            raise ValueError(
                f"{entry.name!r} has shape {entry.shape}, by config.json it has {tuple(weight.parameter.shape)}; "
                "--by-name does not ask the model that it names"
            )
        reason, guessed = weight.reason, weight.guessed
        if not reason and (weight.direction is not None or weight.refused):
            reason, guessed = "is a part of which a layer computes its weight", False
        found[entry.name] = Known(entry, reason, guessed, weight.axes, weight.packed)
    return found


def known(entries: Iterable[Entry], config: Mapping[str, Any]) -> dict[str, Known]:
    """Return what is known of each tensor, in the order in which ties between tensors are resolved.

    That is the order of the names, with numbers in them counted as numbers, as layers mostly follow one another.
    """
    given = sorted(entries, key=lambda entry: in_order(entry.name))
    embeddings = {entry.shape for entry in given if _is_looked_up(entry)}
    text = config.get("text_config")
    inner = text if isinstance(text, Mapping) else {}
    tied = config.get("tie_word_embeddings", inner.get("tie_word_embeddings")) is True
    conv1d = config.get("model_type") in _CONV1D
    found = {}
    for entry in given:
        reason, guessed = _reason(entry)
        path, _, attribute = entry.name.rpartition(".")
        parent = path.rpartition(".")[2]
        if not reason and tied and parent in _HEADS and entry.shape in embeddings:
            reason = "is tied to an embedding, by config.json"
        axes: Axes | None = Axes(1, 0) if conv1d and parent in _OF_CONV1D else Axes()
        axes = axes if len(entry.shape) == 2 or attribute == "weight" else None  # a stack, but which axis is it?
        found[entry.name] = Known(entry, reason, guessed, axes, _GATES if _PACKED.search(attribute) else "")
    return found


def chosen(every: Mapping[str, Known], include: Any = None, exclude: Any = None) -> dict[str, Known]:
    """Return the tensors that are to be pruned; ValueError where nothing is left or a pattern matches nothing.

    A pattern of `include` that matches no weight may take what only its name rules out.
    """
    pool = {name: it for name, it in every.items() if not it.reason}
    by_name = {name: it for name, it in every.items() if it.guessed}
    taken = pool if include is None else _matching("include", include, [pool, by_name], every)
    left_out = {} if exclude is None else _matching("exclude", exclude, [every], every)
    found = {name: it for name, it in every.items() if name in taken and name not in left_out}
    if not found:
        eight = [name for name, it in every.items() if it.entry.dtype.startswith("F8")]
        hint = f"; {eight[0]!r} {every[eight[0]].reason}" if eight else ""
        named = "" if include is exclude is None else f" that include={include!r} and exclude={exclude!r} leave"
        raise ValueError(f"none of the {len(every)} tensors is a weight{named}{hint}")
    scaled = [it for name, it in every.items() if it.entry.dtype.startswith("F8") and len(it.entry.shape) > 1]
    if scaled and include is None and not any(it.entry.name in left_out for it in scaled):
        raise ValueError(f"{scaled[0].entry.name!r} {scaled[0].reason}; or exclude it, and the others like it")
    return found


def in_order(name: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts names with the numbers in them as numbers: h.2 before h.10."""
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _reason(entry: Entry) -> tuple[str, bool]:
    """Why a tensor is no weight, and whether that is said by its name alone; nothing where it is one."""
    path, _, attribute = entry.name.rpartition(".")
    parent = path.rpartition(".")[2]
    if entry.dtype.startswith("F8"):
        return "is in eight bits, whose scale is elsewhere: prune it before it is quantized", False
    if entry.dtype not in FLOATING:
        return f"is {entry.dtype}", False
    if len(entry.shape) < 2:
        return f"has {len(entry.shape)} dimension{'' if entry.shape else 's'}, fewer than two", False
    if _PARAMETRIZED.search(entry.name):
        return "is a part of which a layer computes its weight, by its name", True
    if "bias" in attribute:
        return "is a bias, by its name", True
    if _is_looked_up(entry):
        return "is looked up or added, as an embedding, by its name", True
    if _NORM.search(attribute if attribute != "weight" else parent):
        return "belongs to a normalisation, by its name", True
    if not _MATRIX.search(attribute):
        return f"is called {attribute!r}, which is no name of a weight", True
    return "", False


def _is_looked_up(entry: Entry) -> bool:
    path, _, attribute = entry.name.rpartition(".")
    own = path.rpartition(".")[2] if attribute == "weight" else attribute
    if own in _HEADS:
        return False
    # A convolution may cut an image into what is then called embeddings; it has four dimensions or five.
    return (len(entry.shape) == 2 or attribute != "weight") and bool(_LOOKED_UP.search(own.lower()))


def _matching(
    argument: str, patterns: Any, pools: Iterable[Mapping[str, Known]], every: Mapping[str, Known]
) -> dict[str, Known]:
    found: dict[str, Known] = {}
    for pattern in as_patterns(argument, patterns):
        matched: dict[str, Known] = {}
        for pool in pools:
            matched = matched or {name: it for name, it in pool.items() if fnmatchcase(name, pattern)}
        if not matched:
            others = [name for name in every if fnmatchcase(name, pattern)]
            what = f"only {others[0]!r}, which {every[others[0]].reason}" if others else "no tensor"
            near = [meant for meant in (f"{pattern}.*", f"*{pattern}*") if any(fnmatchcase(n, meant) for n in every)]
            hint = f"; did you mean {near[0]!r}?" if near and not others else ""
            raise ValueError(f"{argument} pattern {pattern!r} matches {what}{hint}")
        found |= matched
    return found
