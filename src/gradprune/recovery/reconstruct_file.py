"""How are the layers of a model pruned one after another that does not fit in memory (chapter 5)?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn

from gradprune.core import checks
from gradprune.core.batches import inputs_of, items
from gradprune.core.checkpoint import Checkpoint, File, opened
from gradprune.core.checks import require
from gradprune.core.evaluate import tensors_in
from gradprune.core.files import StrPath
from gradprune.core.layers import Weight
from gradprune.core.sharded import digest
from gradprune.core.words import in_our_words
from gradprune.core.written import Resumed, target_of
from gradprune.recovery.reconstruct import Share, Work, require_kind, shares
from gradprune.recovery.stored import Stored, made_without_values
from gradprune.weights.eligible import Patterns, StatedAxes
from gradprune.weights.granularity import Granularity, with_axes
from gradprune.weights.plan import Scope
from gradprune.weights.request import Request


class Reconstructed(NamedTuple):
    """What ``reconstruct_file`` wrote.

    Args:
        path: The file, or the folder of a checkpoint in shards.
        layers: The fraction of each layer's weights that is zero now, by parameter name.
        sparsity: The same of all of them together.
    """

    path: Path
    layers: dict[str, float]
    sparsity: float


@in_our_words
def reconstruct_file(
    model: Callable[[], nn.Module] | nn.Module,
    source: StrPath,
    target: StrPath,
    batches: Iterable[Any],
    *,
    sparsity: float | None = None,
    scope: Scope = "layer",
    granularity: Granularity = "weight",
    include: Patterns = None,
    exclude: Patterns = None,
    axes: StatedAxes = None,
    solve: Literal["exact", "one pass"] = "exact",
    damp: float = 0.01,
) -> Reconstructed:
    """Write a pruned copy of a checkpoint that need not fit in memory: what ``reconstruct_`` makes of it, bit for bit.

    The model is made without values. Where it is a chain of blocks, as transformers are, those of one block at a time
    are read, pruned and written, and the others left to the files: in memory are one block, one layer's X'X in float64
    with its factors, and for each batch what the block is given. Any other model is mapped from the files whenever it
    runs.

    What is done stands in the folder ``<target>.unfinished`` until the end, with the place of the output. A call that
    was interrupted or killed goes on from there when it is repeated, and comes to the same bits.

    Args:
        model: a function that makes the network, such as ``lambda: LlamaForCausalLM(config)``; no parameter that it
            makes gets memory. Or a network on the meta device, whose buffers have values unless they are in the
            checkpoint. Its weights get the dtypes of the checkpoint.
        source: a safetensors file, or a folder with shards and their index, whose names are the model's.
        target: the file; for a folder a new folder, which gets the files beside the weights too.
        batches: as for ``reconstruct_``, and all other arguments too.
        sparsity: see there.
        scope: see there.
        granularity: see there.
        include: see there.
        exclude: see there.
        axes: see there.
        solve: see there.
        damp: see there.

    Returns:
        A ``Reconstructed``: the path, and how much of each layer is zero.

    Raises:
        ValueError: as ``reconstruct_``; where the checkpoint is not the model's, is packed or was pickled, `target`
            cannot be written, or what stands unfinished is of another call.
        TypeError: where a parameter of the model has values, or an argument is of another kind.
        FileNotFoundError: there is no such checkpoint.
        OSError: there is no room on the disk, or the source was written meanwhile.

    Warns as ``reconstruct_``, and where the checkpoint has tensors that the model has not.

    Example:
        >>> make, x = lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(64, 8)
        >>> gp.save(make(), "dense.safetensors")
        >>> done = gp.reconstruct_file(make, "dense.safetensors", "pruned.safetensors", [x], sparsity=0.5)
        >>> done.layers
        {'0.weight': 0.5, '2.weight': 0.5}

    Frantar and Alistarh (2023), section 3.4; chapter 5.
    """
    damp = checks.number("damp", damp, least=0.0)
    checks.choice("solve", solve, ("exact", "one pass"))
    inputs = items(inputs_of(batches), "an iterable of batches")
    with opened(source, "source") as checkpoint:
        for part in checkpoint.parts:
            require(isinstance(part, File), f"{part.name!r} was pickled: save its tensors with safetensors")
        path = target_of(checkpoint, target, "target")
        if not isinstance(model, nn.Module):
            model = made_without_values(checks.function("model", model))
        stored = Stored(model, checkpoint)
        with stored.attached(model):
            request = Request.of(
                model, scope=scope, granularity=granularity, include=include, exclude=exclude, axes=axes
            )
            layers = with_axes(request.layers)
            choices = shares(request, layers, sparsity)
            for weight in layers.values():
                require_kind(weight)
            call = _call(model, checkpoint, layers, choices, inputs) | {"solve and damp": [solve, damp]}
            with Resumed(checkpoint, path, call) as result, stored.into(result, layers):
                Work(model, layers, {}, choices, stored, exact=solve == "exact", damp=damp).do(inputs)
        pruned = {name: w.parameter.numel() - choices[name].count(w) for name, w in layers.items()}
        sizes = {name: w.parameter.numel() for name, w in layers.items()}
        found = {name: pruned[name] / max(size, 1) for name, size in sizes.items()}
        return Reconstructed(path, found, sum(pruned.values()) / max(sum(sizes.values()), 1))


def _call(
    model: nn.Module,
    source: Checkpoint,
    layers: Mapping[str, Weight],
    choices: Mapping[str, Share],
    batches: Sequence[Any],
) -> dict[str, Any]:
    """All that the result depends on, by what it is."""
    return {
        "the models": [type(model).__name__, hashlib.sha256(repr(model).encode()).hexdigest()],
        "the checkpoints": [[part.name, *part.version] for part in source.parts if isinstance(part, File)],
        "the layers, or how many of their weights stay,": {n: [choices[n], str(w.axes)] for n, w in layers.items()},
        "the batches": digest({str(n): tensor for n, tensor in enumerate(tensors_in(list(batches)))}),
    }
