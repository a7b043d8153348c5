"""Which channels does a network couple, so that they can go only together (chapter 8)?

Torch-Pruning follows the network from each layer's outputs to whatever must lose a channel with it: the norms and
depthwise filters on the way, the layers that add their own outputs to it, those that read it. Here that becomes units:
for one channel of one layer, the places in all others that go with it. Heads of attention are units of their own, found
by how the layers of an attention are called, since a view by heads hides them from any trace.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from gradprune.core.evaluate import NoExample, call_on, evaluated, tensors_in

Side = Literal["out", "in", "both", "parameter"]

OUTPUTS = "they come out of the network"
OVER_CHANNELS = "normalises over channels, so that taking one out would change the others"


class Part(NamedTuple):
    """One side of a layer; `both` where the channels that come in are those that go out, as of a norm."""

    name: str
    module: nn.Module
    side: Side
    attribute: str = ""  # of a parameter that belongs to no layer of a known kind
    dim: int = 0


Unit = dict[Part, tuple[int, ...]]


@dataclass
class Coupled:
    """Channels that share layers: units, each of which can go alone unless grouped convolutions want equal numbers."""

    units: list[Unit]
    stays: str = ""  # why none can go
    sizes: Mapping[str, int] = field(default_factory=dict)  # attributes of an attention: what one unit takes of each
    owner: nn.Module | None = None  # the attention

    @property
    def parts(self) -> list[Part]:
        """All sides of layers that any unit touches."""
        return list(dict.fromkeys(part for unit in self.units for part in unit))


def torch_pruning(asker: str) -> ModuleType:
    """Return the library, or raise ImportError that says how to get it."""
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(f"{asker} needs Torch-Pruning: pip install 'gradprune[deploy]'") from error
    return torch_pruning  # type: ignore[no-any-return, unused-ignore]


def coupled(model: nn.Module, example: Any, asker: str) -> list[Coupled]:
    """Return what the network couples: channels, then heads of attention.

    Raises:
        ImportError: where Torch-Pruning is not installed.
        ValueError: where the network cannot be traced.
    """
    heads = list(_heads(model))
    taken = {(part.module, part.side) for group in heads for part in group.parts}
    return [*_channels(model, example, asker, taken), *heads]


def width(part: Part) -> int:
    """How many channels a side has."""
    module: Any = part.module
    if part.side == "parameter":
        return int(getattr(module, part.attribute).shape[part.dim])
    if isinstance(module, _ConvNd):
        return int(module.in_channels if part.side == "in" else module.out_channels)
    if isinstance(module, nn.Linear):
        return int(module.in_features if part.side == "in" else module.out_features)
    if is_transposed_linear(module):
        return int(module.nx if part.side == "in" else module.nf)
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    if isinstance(module, nn.PReLU):
        return module.num_parameters
    return int(module.num_features)


def is_depthwise(module: nn.Module) -> bool:
    """Whether a convolution has one filter a channel."""
    return isinstance(module, _ConvNd) and 1 < module.groups == module.out_channels == module.in_channels


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether it is the linear layer of GPT-2, which stores [in, out]."""
    return any(kind.__name__ == "Conv1D" and hasattr(module, "nf") for kind in type(module).__mro__)


def groups_of(part: Part) -> int:
    """Of how many groups a side is, each of which has to be as wide as the others; 1 where there are none."""
    module: Any = part.module
    return int(module.groups) if isinstance(module, _ConvNd) and not is_depthwise(module) else 1


def place(group: Coupled, unit: Unit) -> tuple[int, ...]:
    """In which groups of the grouped convolutions among the group's layers a unit is."""
    fixed = [part for part in group.parts if groups_of(part) > 1]
    return tuple(c // (width(part) // groups_of(part)) for part in fixed for c in unit.get(part, ()))


def reads(part: Part) -> bool:
    """Whether the part is the input side of a layer that sums over channels."""
    return part.side == "in"


def writes(part: Part) -> bool:
    """Whether the part is a filter, whose weights say whether its channel is alive."""
    return part.side == "out" or (part.side == "both" and isinstance(part.module, _ConvNd))


# ------------------------------------------------------------------------------------------------ Torch-Pruning's graph


def _channels(model: nn.Module, example: Any, asker: str, taken: set[Any]) -> Iterator[Coupled]:
    graph, splits = _graph(model, example, asker)
    names = {module: name for name, module in model.named_modules()}
    places = {
        id(p): (name, module, attribute)
        for name, module in model.named_modules()
        for attribute, p in module._parameters.items()
        if p is not None
    }
    seen: set[tuple[nn.Module, int]] = set()
    for root in list(graph.module2node):
        if not _is_layer(root) or is_depthwise(root):
            continue
        size = width(Part("", root, "out"))
        group = _follow(graph, root, [c for c in range(size) if (root, c) not in seen], names, places, splits)
        for unit in group.units:
            seen |= {(part.module, c) for part, cs in unit.items() if writes(part) for c in cs}
        if group.units and not taken & {(part.module, part.side) for part in group.parts}:
            yield group


def _is_layer(module: Any) -> bool:
    return isinstance(module, _ConvNd | nn.Linear) or (isinstance(module, nn.Module) and is_transposed_linear(module))


def _graph(model: nn.Module, example: Any, asker: str) -> tuple[Any, dict[Any, tuple[int, int]]]:
    """The library's graph, and the sizes of the axes that views in it split."""
    library = torch_pruning(asker)

    joined = _Shapes()

    def forward(network: nn.Module, inputs: Any) -> list[torch.Tensor]:
        with joined:
            found = [t for t in tensors_in(call_on(network, inputs)) if t.grad_fn is not None]
        if not found:
            raise ValueError("no output depends on a parameter")
        return found

    transposed = {type(module) for module in model.modules() if is_transposed_linear(module)}
    pruners = {kind: _transposed_linear_pruner(library) for kind in transposed}
    graph = library.DependencyGraph()
    link = graph._build_dependency

    def link_and_say_sizes(nodes: Any) -> None:
        link(nodes)
        joined.say_sizes(library, nodes, graph)

    graph._build_dependency = link_and_say_sizes  # after the trace, before the library looks for sizes itself
    with evaluated(model), _differentiable(model), torch.enable_grad():
        try:
            graph.build_dependency(model, example, forward_fn=forward, customized_pruners=pruners, verbose=False)
            joined.map(library)
            _map_splits(library, graph)
            return graph, joined.splits
        except NoExample:
            raise
        except Exception as error:
            raise ValueError(
                f"Torch-Pruning cannot follow this {type(model).__name__} from layer to layer, "
                f"{type(error).__name__}: {error}. Does the forward pass run under autograd?"
            ) from error


class _Shapes(torch.overrides.TorchFunctionMode):
    """What the gradient's graph does not keep: the sizes that torch.cat joins, and which views split channels.

    The library guesses the sizes, fails where it cannot, and takes no notice of what comes from the network's input. A
    view by heads or groups it takes for one that leaves each channel in its place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Any, tuple[int, list[tuple[Any, int]], int]] = {}
        self.splits: dict[Any, tuple[int, int]] = {}
        self.nodes: list[tuple[Any, list[tuple[Any, int]]]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function in (torch.cat, torch.concat, torch.concatenate) and out.grad_fn is not None:
            tensors = args[0] if args else kwargs["tensors"]
            dim = args[1] if len(args) > 1 else next((kwargs[k] for k in ("dim", "axis") if k in (kwargs or {})), 0)
            dim %= out.dim()
            parts = [(t.grad_fn, t.shape[dim]) for t in tensors if t.dim() == out.dim()]
            self.seen[out.grad_fn] = dim, parts, out.dim()
        elif isinstance(out, torch.Tensor) and args and isinstance(args[0], torch.Tensor):
            self.splits[out.grad_fn] = _split(args[0].shape, out.shape)
        return out

    def say_sizes(self, library: ModuleType, nodes: Any, graph: Any) -> None:
        """Tell each concatenation of channels its sizes, and all others that they join no channels."""
        infer = library.dependency.shape_infer.infer_out_channels_recursively
        graph.REGISTERED_PRUNERS[library.ops.OPTYPE.CONCAT].get_out_channels = _channels_joined
        found = {node.grad_fn: node for node in nodes.values() if type(node.module).__name__ == "_ConcatOp"}
        for node in found.values():
            node.enable_index_mapping = False  # it is said below
        for function, (dim, parts, axes) in self.seen.items():  # in the order of the forward pass
            node = found.get(function)
            if node is None:
                continue
            sizes = {function: size for function, size in parts if function is not None}
            known = [(infer(graph, n, [0]), sizes.get(n.grad_fn)) for n in node.inputs]
            of_channels = 0 < dim in (1, axes - 1) and all(a == b for a, b in known if a is not None)
            node.module.concat_sizes = [size for _, size in parts]
            if of_channels:
                node.module.joined = sum(node.module.concat_sizes)
                self.nodes.append((node, parts))

    def map(self, library: ModuleType) -> None:
        """Say which channels of the whole each part is."""
        mapping = library.dependency.index_mapping._ConcatIndexMapping
        for node, parts in self.nodes:
            start = 0
            for function, size in parts:
                ends = [start, start + size]
                start += size
                for source in dict.fromkeys(n for n in node.inputs if n.grad_fn is function):
                    for here, there, back in ((node, source, True), (source, node, False)):
                        free = (d for d in here.dependencies if d.target is there and d.index_mapping[1] is None)
                        if (dependency := next(free, None)) is not None:
                            dependency.index_mapping[1] = mapping(offset=ends, reverse=back)


def _split(before: torch.Size, after: torch.Size) -> tuple[int, int]:
    """The size of the axis, the last or the second, that became two, and that of the other; zeros where none did."""
    if len(before) < 3 or len(after) != len(before) + 1:
        return 0, 0
    last = after[:-2] == before[:-1] and after[-2] * after[-1] == before[-1] and after[-2] > 1
    second = after[0] == before[0] and after[3:] == before[2:] and after[1] * after[2] == before[1]
    if last:
        return before[-1], before[1]
    return (before[1], before[-1]) if second and after[1] > 1 and after[2] > 1 else (0, 0)


def _channels_joined(concatenation: Any) -> int | None:
    return getattr(concatenation, "joined", None)


def _map_splits(library: ModuleType, graph: Any) -> None:
    """Say which channels each part of a split has, whatever its axis; the library knows it of axis 1 only."""
    mapping, infer = library.dependency.index_mapping._SplitIndexMapping, library.dependency.shape_infer
    for node in graph.module2node.values():
        split = node.grad_fn
        shape = getattr(split, "_saved_self_sym_sizes", None)
        dim = getattr(split, "_saved_dim", None)
        if type(node.module).__name__ != "_SplitOp" or shape is None or dim is None:
            continue
        dim = dim - 2**64 if dim >= 2**63 else dim  # of a negative axis
        dim = dim + len(shape) if dim < 0 else dim
        whole = next((infer.infer_out_channels_recursively(graph, n, [0]) for n in node.inputs), None)
        if not 0 < dim < len(shape) or whole != shape[dim]:
            continue
        sizes = getattr(split, "_saved_split_sizes", None)
        if sizes is None:
            step = split._saved_split_size
            sizes = [min(step, whole - start) for start in range(0, whole, step)]
        for out in node.outputs:
            which = [number for function, number in out.grad_fn.next_functions if function is split]
            if len(which) != 1:
                continue
            ends = [sum(sizes[: which[0]]), sum(sizes[: which[0] + 1])]
            for dependency in node.dependencies:
                if dependency.target is out:
                    dependency.index_mapping[0] = mapping(offset=ends, reverse=False)
            for dependency in out.dependencies:
                if dependency.target is node:
                    dependency.index_mapping[0] = mapping(offset=ends, reverse=True)


@contextlib.contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """The trace follows gradients: frozen parameters have none."""
    frozen = [p for p in model.parameters() if not p.requires_grad and (p.is_floating_point() or p.is_complex())]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _transposed_linear_pruner(library: ModuleType) -> Any:
    class TransposedLinearPruner(library.pruner.function.BasePruningFunc):  # type: ignore[misc, name-defined]
        """What the graph asks of a layer; it is cut elsewhere."""

        def prune_out_channels(self, layer: Any, idxs: Any) -> Any:
            return layer

        def prune_in_channels(self, layer: Any, idxs: Any) -> Any:
            return layer

        def get_out_channels(self, layer: Any) -> int:
            return int(layer.nf)

        def get_in_channels(self, layer: Any) -> int:
            return int(layer.nx)

    return TransposedLinearPruner()


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
            for mapping in dependency.index_mapping:
                if mapping is not None:
                    indices = mapping(indices)
            if any(index.root_idx is None for index in indices):
                stays = "is repeated for several heads of an attention of a kind that is not known"
                continue
            if indices:
                stack.append((dependency.target, dependency.handler, tuple((i.idx, i.root_idx) for i in indices)))
    units: dict[int, dict[Part, set[int]]] = defaultdict(lambda: defaultdict(set))
    for (node, handler), found in reached.items():
        part, why = _part(graph, node, handler, names, places)
        stays = stays or why
        if part is not None and max(found) >= width(part):
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
    if _is_layer(module):
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


# ------------------------------------------------------------------------------------------------- heads of attention

_QUERY, _KEY, _VALUE = (
    ("q_proj", "query", "q", "to_q"),
    ("k_proj", "key", "k", "to_k"),
    ("v_proj", "value", "v", "to_v"),
)
_FUSED = ("c_attn",)
_OUT = ("o_proj", "out_proj", "dense", "c_proj", "o", "proj", "to_out")
_HEAD_SIZE = ("head_dim", "attention_head_size", "d_kv")
_HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_WIDTHS = ("embed_dim", "all_head_size", "split_size", "inner_dim")


def _heads(model: nn.Module) -> Iterator[Coupled]:
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


def _projections(name: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> Any:
    if isinstance(module, nn.MultiheadAttention):
        return None
    out = _layer_of(name, module, _OUT)
    if out is None and (parent := name.rpartition(".")[0]) + ".output" in modules:
        out = _layer_of(f"{parent}.output", modules[f"{parent}.output"], ("dense",))
    if out is None:
        return None
    read = Part(*out, "in")
    fused = _layer_of(name, module, _FUSED)
    if fused is not None:
        part = Part(*fused, "out")
        third = width(part) // 3
        if third != width(read):
            return None
        places = [[(part, c) for c in range(n * third, (n + 1) * third)] for n in range(3)]
    else:
        layers = [_layer_of(name, module, called) for called in (_QUERY, _KEY, _VALUE)]
        if any(layer is None for layer in layers):
            return None
        parts = [Part(*layer, "out") for layer in layers if layer is not None]
        places = [[(part, c) for c in range(width(part))] for part in parts]
    size = _whole(module, _HEAD_SIZE)
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
