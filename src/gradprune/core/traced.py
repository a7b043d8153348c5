"""What does Torch-Pruning's graph of a network know, and what has to be told to it (chapter 8)?

The library follows gradients from the outputs back. What those do not keep is recorded beside the forward pass: the
sizes that concatenations join, which channels a part of a split has, and the axes that a view splits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import nn

from gradprune.core.evaluate import NoExample, call_on, evaluated, tensors_in
from gradprune.core.units import is_transposed_linear


def torch_pruning(asker: str) -> ModuleType:
    """Return the library, or raise ImportError that says how to get it."""
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(f"{asker} needs Torch-Pruning: pip install 'gradprune[deploy]'") from error
    return torch_pruning  # type: ignore[no-any-return, unused-ignore]


def graph_of(model: nn.Module, example: Any, asker: str) -> tuple[Any, dict[Any, tuple[int, int]]]:
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
