"""Which channels of an attention are one head (chapter 8)?

A view by heads hides them from any trace, so they are found by how the layers of an attention are called.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from gradprune.core.units import Coupled, Part, Unit, is_transposed_linear, width

_QUERY, _KEY, _VALUE = (
    ("q_proj", "query", "q", "to_q", "q_lin"),
    ("k_proj", "key", "k", "to_k", "k_lin"),
    ("v_proj", "value", "v", "to_v", "v_lin"),
)
_FUSED = ("c_attn",)  # all queries, all keys, all values
_BY_HEAD = ("query_key_value",)  # those of one head after those of another
_OUT = ("o_proj", "out_proj", "dense", "c_proj", "o", "proj", "to_out", "out_lin")
_HEAD_SIZE = ("head_dim", "attention_head_size", "d_kv", "head_size")
_HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_WIDTHS = ("embed_dim", "all_head_size", "split_size", "inner_dim")


def heads_of(model: nn.Module) -> Iterator[Coupled]:
    """Heads of the attentions whose layers are called as in transformers, and share nothing between heads.

    With fewer keys and values than queries a unit is one head of those with all queries that use it.
    """
    modules = dict(model.named_modules())
    for name, module in modules.items():
        found = _projections(name, module, modules)
        if found is None:
            continue
        size, queries, keys, values, out = found
        own = (*vars(module), *module._modules, *module._parameters, *module._buffers)
        stays = "its positions are relative, by head" if any("relative" in attribute for attribute in own) else ""
        heads, read = len(values) // size, width(out) // size
        if heads > 1 and _normalises(module, {len(queries), len(keys)}):
            stays = "a norm is over all of its heads, so that taking one out would change the others"
        if heads < 1 or read % heads or len(values) % size:
            continue
        repeat = read // heads
        units: list[Unit] = []
        for head in range(heads):
            unit: dict[Part, tuple[int, ...]] = {out: _block(head, repeat * size)}
            for places, of_one in ((queries, repeat), (keys, 1), (values, 1)):
                for at in _block(head, of_one * size):
                    part, c = places[at]
                    unit[part] = (*unit.get(part, ()), c)
            units.append(unit)
        sizes = {**dict.fromkeys(_HEADS, repeat), **dict.fromkeys(_KV_HEADS, 1)}
        sizes |= {a: repeat * size for a in _WIDTHS if getattr(module, a, None) == read * size}
        owned = {attribute: n for attribute, n in sizes.items() if type(getattr(module, attribute, None)) is int}
        yield Coupled(units, stays, owned, module)


def _normalises(module: nn.Module, widths: set[int]) -> bool:
    """Whether it has a norm of queries or keys, by its name, with a scale for each channel of all heads."""
    norms = (
        child for name, child in module._modules.items() if child is not None and name[:1] in "qk" and "norm" in name
    )
    scales = (norm._parameters.get("weight") for norm in norms)
    return any(scale is not None and scale.dim() == 1 and scale.numel() in widths for scale in scales)


def _projections(name: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> Any:
    if isinstance(module, nn.MultiheadAttention):
        return None
    out = _layer_of(name, module, _OUT)
    if out is None and (parent := name.rpartition(".")[0]) + ".output" in modules:
        out = _layer_of(f"{parent}.output", modules[f"{parent}.output"], ("dense",))
    if out is None:
        return None
    read = Part(*out, "in")
    size = _whole(module, _HEAD_SIZE)
    fused = _layer_of(name, module, _FUSED)
    joined = fused or (_layer_of(name, module, _BY_HEAD) if _whole(module, ("head_size",)) else None)
    if joined is not None:
        part = Part(*joined, "out")
        third = width(part) // 3
        if third != width(read):
            return None
        run = third if fused is not None else size  # channels that are queries, then as many keys, then values
        places = [[(part, c) for c in range(3 * third) if c // run % 3 == n] for n in range(3)]
    else:
        layers = [_layer_of(name, module, called) for called in (_QUERY, _KEY, _VALUE)]
        if any(layer is None for layer in layers):
            return None
        parts = [Part(*layer, "out") for layer in layers if layer is not None]
        places = [[(part, c) for c in range(width(part))] for part in parts]
    heads = _whole(module, _HEADS)
    size = size or (len(places[0]) // heads if heads else 0)
    agree = size and len(places[0]) == width(read) and len(places[1]) == len(places[2])
    return (size, *places, read) if agree else None


def _layer_of(name: str, module: nn.Module, called: Iterable[str]) -> tuple[str, nn.Module] | None:
    for attribute in called:
        layer = module._modules.get(attribute)
        if layer is not None and (isinstance(layer, nn.Linear) or is_transposed_linear(layer)):
            return (f"{name}.{attribute}" if name else attribute), layer
    return None


def _whole(module: nn.Module, called: Iterable[str]) -> int:
    return next((value for a in called if type(value := getattr(module, a, None)) is int), 0)


def _block(index: int, size: int) -> tuple[int, ...]:
    return tuple(range(index * size, (index + 1) * size))
