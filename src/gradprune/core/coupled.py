"""Which channels does a network couple, so that they can go only together (chapter 8)?

Torch-Pruning follows the network from each layer's outputs to whatever must lose a channel with it: the norms and
depthwise filters on the way, the layers that add their own outputs to it, those that read it. Here that becomes units:
for one channel of one layer, the places in all others that go with it. Heads of attention are units of their own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from gradprune.core.heads import heads_of
from gradprune.core.traced import graph_of
from gradprune.core.units import Coupled, Part, Side, is_depthwise, is_layer, width, writes

OUTPUTS = "they come out of the network"
OVER_CHANNELS = "normalises over channels, so that taking one out would change the others"


def coupled(model: nn.Module, example: Any, asker: str) -> list[Coupled]:
    """Return what the network couples: channels, then heads of attention.

    Raises:
        ImportError: where Torch-Pruning is not installed.
        ValueError: where the network cannot be traced.
    """
    heads = list(heads_of(model))
    taken = {(part.module, part.side) for group in heads for part in group.parts}
    return [*_channels(model, example, asker, taken), *heads]


def _channels(model: nn.Module, example: Any, asker: str, taken: set[Any]) -> Iterator[Coupled]:
    graph, splits = graph_of(model, example, asker)
    names = {module: name for name, module in model.named_modules()}
    places = {
        id(p): (name, module, attribute)
        for name, module in model.named_modules()
        for attribute, p in module._parameters.items()
        if p is not None
    }
    seen: set[tuple[nn.Module, int]] = set()
    for root in list(graph.module2node):
        if not is_layer(root) or is_depthwise(root):
            continue
        size = width(Part("", root, "out"))
        group = _follow(graph, root, [c for c in range(size) if (root, c) not in seen], names, places, splits)
        for unit in group.units:
            seen |= {(part.module, c) for part, cs in unit.items() if writes(part) for c in cs}
        if group.units and not taken & {(part.module, part.side) for part in group.parts}:
            yield group


def _follow(
    graph: Any,
    root: nn.Module,
    channels: list[int],
    names: Mapping[Any, str],
    places: Any,
    splits: Mapping[Any, tuple[int, int]],
) -> Coupled:
    """Walk from a layer's outputs as ``DependencyGraph.get_pruning_group`` does, but keep apart what it merges.

    It answers for a set of channels at once and drops which of two channels led to one place; here such two are joined.
    """
    from torch_pruning._helpers import _HybridIndex  # type: ignore[import-untyped, unused-ignore]

    if not channels:
        return Coupled([])
    node = graph.module2node[root]
    handler = graph.get_pruner_of_module(root).prune_out_channels
    start = tuple((c, c) for c in channels)
    reached: dict[tuple[Any, Any], dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    visited = set()
    stack = [(node, handler, start)]
    stays, joined = "", _Joined(channels)
    while stack:
        node, handler, pairs = stack.pop()
        if (node, handler, pairs) in visited:
            continue
        visited.add((node, handler, pairs))
        if _is_split(node, graph, splits):
            stays = "a view splits them, into heads or groups, in a way that is not followed"
        for place, first in pairs:
            for other in reached[node, handler][place]:
                joined.join(first, other)
            reached[node, handler][place].add(first)
        for dependency in node.dependencies:
            if not dependency.is_triggered_by(handler):
                continue
            indices = [_HybridIndex(idx=place, root_idx=first) for place, first in pairs]
            try:
                for mapping in dependency.index_mapping:
                    if mapping is not None:
                        indices = mapping(indices)
            except IndexError:  # of pieces along another dimension than the channels'
                stays = "is cut into pieces in a way that is not followed"
                continue
            if any(index.root_idx is None for index in indices):
                stays = "is repeated for several heads of an attention of a kind that is not known"
                continue
            if indices:
                stack.append((dependency.target, dependency.handler, tuple((i.idx, i.root_idx) for i in indices)))
    units: dict[int, dict[Part, set[int]]] = defaultdict(lambda: defaultdict(set))
    for (node, handler), found in reached.items():
        part, why = _part(graph, node, handler, names, places)
        stays = stays or why
        if part is not None and not 0 <= min(found) <= max(found) < width(part):
            stays = stays or f"the way to {part.name!r} takes channels apart as Torch-Pruning does not follow it"
        elif part is not None:
            for place, roots in found.items():
                units[joined.of(next(iter(roots)))][part].add(place)
    every = [{part: tuple(sorted(places)) for part, places in unit.items()} for unit in units.values()]
    return Coupled(every, stays)


def _is_split(node: Any, graph: Any, splits: Mapping[Any, tuple[int, int]]) -> bool:
    """Whether a view splits the channels, and not the positions, as far as their number tells."""
    size, other = splits.get(node.grad_fn, (0, 0))
    if not size or type(node.module).__name__ != "_ReshapeOp":
        return False
    from torch_pruning.dependency.shape_infer import infer_out_channels_recursively

    widths = [infer_out_channels_recursively(graph, before, [0]) for before in node.inputs]
    return not any(width == other != size for width in widths)


def _part(graph: Any, node: Any, handler: Any, names: Mapping[Any, str], places: Any) -> tuple[Part | None, str]:
    """The side of a layer that a step of the walk has reached, and why its channels cannot go."""
    module = node.module
    if isinstance(module, nn.Parameter):
        name, owner, attribute = places[id(module)]
        called = f"{name}.{attribute}" if name else attribute
        over = "Norm" in type(owner).__name__
        part = Part(called, owner, "parameter", attribute, node.pruning_dim % module.dim())
        return part, f"{name!r} ({type(owner).__name__}) {OVER_CHANNELS}" if over else ""
    if type(module).__name__ == "_OutputOp":
        return None, OUTPUTS
    if module not in names:
        return None, ""
    name = names[module]
    called = f"{name!r} ({type(module).__name__})"
    if parametrize.is_parametrized(module) or any("_orig" in n or n[-2:] == "_v" for n in module._parameters):
        return None, f"{called} computes its weight from other parameters"
    if is_layer(module):
        both = is_depthwise(module)
        side: Side = "both" if both else "out" if graph.is_out_channel_pruning_fn(handler) else "in"
        return Part(name, module, side), ""
    if isinstance(module, _BatchNorm | _InstanceNorm | nn.Embedding) or (
        isinstance(module, nn.PReLU) and module.num_parameters > 1
    ):
        return Part(name, module, "both"), ""
    if isinstance(module, nn.LayerNorm | nn.GroupNorm) or "Norm" in type(module).__name__:
        return None, f"{called} {OVER_CHANNELS}"
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return None, f"{called} keeps its width"
    return None, ""


class _Joined:
    """Channels of which two that meet are one (union-find)."""

    def __init__(self, channels: Iterable[int]) -> None:
        self._parent = {c: c for c in channels}

    def of(self, c: int) -> int:
        while self._parent[c] != c:
            self._parent[c] = c = self._parent[self._parent[c]]
        return c

    def join(self, a: int, b: int) -> None:
        self._parent[self.of(a)] = self.of(b)
