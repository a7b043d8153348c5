"""How is a checkpoint pruned that need not fit in memory, to the masks of ``prune`` on the loaded model, bit for bit?

What is asked for is checked against the headers; what stays of each tensor is said by `stays`; then all tensors are
copied, those that are pruned with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gradprune.core import checks
from gradprune.core.checkpoint import Checkpoint, Tensors, opened, spans
from gradprune.core.checks import require
from gradprune.core.header import DTYPES
from gradprune.core.layers import Weight
from gradprune.core.progress import bar
from gradprune.core.threads import behind, mapped, threads_of_torch
from gradprune.core.written import Output, require_room, target_of, whole
from gradprune.deploy import names
from gradprune.deploy.architecture import layers_of
from gradprune.deploy.packed import KEY
from gradprune.deploy.stays import Seen, Way, read_before, ways
from gradprune.deploy.threshold import VALUES
from gradprune.weights.granularity import Granularity, Units, check_channels, check_fits, parse_granularity
from gradprune.weights.plan import Scope, kept_of, rows_in

SCOPES = ("global", "layer", "row", "erk", "lamp")


class Row(NamedTuple):
    """What is done with one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    weights: int
    kept: int | None  # None where it is not pruned, or not yet
    reason: str = ""  # why it is not pruned


@dataclass(frozen=True)
class Pruning:
    """What was done with a checkpoint, or would be."""

    rows: tuple[Row, ...]
    goal: int | None  # weights that go; of channels and blocks, about so many; of a threshold not known before
    size: int  # bytes, before and after
    notes: tuple[str, ...] = ()
    done: bool = True

    @property
    def weights(self) -> int:
        """Weights that could go."""
        return sum(row.weights for row in self.rows if not row.reason)

    @property
    def pruned(self) -> int:
        """Weights that went."""
        return sum(row.weights - row.kept for row in self.rows if row.kept is not None)


@dataclass(frozen=True)
class _Job:
    """What of a checkpoint is to be pruned, and how."""

    every: Mapping[str, names.Known]
    tensors: Mapping[str, Tensors]  # that are pruned, in the order in which ties are resolved
    units: Units
    sparsity: float | None
    scope: Scope
    n_of_m: tuple[int, int] | None
    threshold: float | None
    min_keep: int | None
    notes: tuple[str, ...]

    @property
    def goal(self) -> int | None:
        """Weights that go; None where that is only known when all are read."""
        if self.threshold is not None:
            return None
        weights = self.units.layers
        if self.n_of_m is not None:
            n, m = self.n_of_m
            return sum(w.parameter.numel() // m * (m - n) for w in weights.values())
        assert self.sparsity is not None
        if self.scope == "row":
            rows = [rows_in(w, w.parameter).shape for w in weights.values()]
            return sum(height * (width - kept_of(width, self.sparsity)) for height, width in rows)
        total = sum(w.parameter.numel() for w in weights.values())
        return total - kept_of(total, self.sparsity)

    def told(self, size: int, kept: Mapping[str, int] | None) -> Pruning:
        """What is said of it, before and after."""
        rows = []
        for name, it in self.every.items():
            reason = "" if name in self.tensors else it.reason or "is left out by include or exclude"
            left = None if kept is None else kept.get(name)
            rows.append(Row(name, it.entry.dtype, it.entry.shape, it.entry.numel, left, reason))
        return Pruning(tuple(rows), self.goal, size, self.notes, kept is not None)


def prune_file(
    source: Any,
    target: Any = None,
    *,
    sparsity: float | None = None,
    threshold: float | None = None,
    scope: Scope = "global",
    granularity: Granularity = "weight",
    include: Any = None,
    exclude: Any = None,
    min_keep: int | None = None,
    by_name: bool = False,
    dry_run: bool = False,
) -> Pruning:
    """Write a pruned copy of a checkpoint, whole or not at all, and return what was done; arguments as of ``prune``.

    Args:
        source: a safetensors file, a folder with one or with shards and their index, or a state dict of torch.save's.
        target: a file, which may be the source; of a folder a new folder.
        sparsity: as of ``prune``, as are `threshold`, `scope` (one of `SCOPES`), `granularity`, `include`, `exclude`
            and `min_keep`, which over all layers ranks the weights in memory; LAMP reads them up to five times.
        threshold: see there.
        scope: see there.
        granularity: see there.
        include: see there.
        exclude: see there.
        min_keep: see there.
        by_name: whether to tell weights by their names also where the layers could be asked.
        dry_run: whether to return what would be done, with nothing read but headers and nothing written.
    """
    with opened(source) as checkpoint:
        for part in checkpoint.parts:
            require(KEY not in part.header.metadata, f"{part.name!r} is packed: unpack it first")
        job = _job(checkpoint, sparsity, threshold, scope, granularity, include, exclude, min_keep, by_name)
        if dry_run:
            return job.told(checkpoint.size, None)
        path = target_of(checkpoint, target)
        require_room(path, checkpoint.size)
        amount: dict[str, Any] = {"threshold": job.threshold, "min_keep": job.min_keep}
        reading = read_before(job.tensors, job.units.block is not None, job.scope, job.n_of_m is not None, **amount)
        with bar(checkpoint.size + reading, "pruning", unit="B") as progress:
            found = ways(job.tensors, job.units, job.sparsity, job.scope, job.n_of_m, progress.update, **amount)
            with whole(checkpoint, path, checkpoint.size) as place:
                kept = _write(checkpoint, job.every, found, place, progress.update)
        return job.told(checkpoint.size, kept)


def _job(
    checkpoint: Checkpoint,
    sparsity: Any,
    threshold: Any,
    scope: Scope,
    granularity: Granularity,
    include: Any,
    exclude: Any,
    min_keep: Any,
    by_name: bool,
) -> _Job:
    """Everything that can be refused before a tensor is read is refused here."""
    n_of_m, block = parse_granularity(granularity)
    known_scope = isinstance(scope, str) and scope in SCOPES
    require(known_scope, f"scope must be one of {', '.join(SCOPES)} for files, got {scope!r}")
    min_keep = None if min_keep is None else checks.whole("min_keep", min_keep, least=0)
    if n_of_m is not None:
        n, m = n_of_m
        require(scope in ("global", "layer"), f"granularity {n}:{m} leaves nothing to allocate; got scope={scope!r}")
        right = threshold is None and (
            sparsity is None or abs(checks.fraction("sparsity", sparsity) - (1 - n / m)) < 1e-9
        )
        require(right, f"granularity {n}:{m} is itself a sparsity of {1 - n / m:g}: give no other")
    else:
        missing = sparsity is None and threshold is None
        require(not missing, "a sparsity is missing: the fraction of the weights that goes, such as 0.5")
        require(sparsity is None or threshold is None, "give a sparsity or a threshold, not both")
        sparsity = None if sparsity is None else checks.fraction("sparsity", sparsity)
        threshold = None if threshold is None else checks.number("threshold", threshold, finite=False)
        shared = threshold is None or scope in ("global", "layer")
        require(shared, f"scope={scope!r} shares out a sparsity; it does not go with a threshold")
    require(scope != "row" or block is None, f"scope='row' prunes single weights; got granularity={granularity!r}")
    asked = None if by_name else layers_of(checkpoint)
    joined = asked if asked is not None and asked.joined else None
    asked = None if joined is not None else asked
    entries = [t.entry for t in checkpoint.tensors.values()]
    config = checkpoint.config()
    every = names.known(entries, config) if asked is None else names.told_by_layers(entries, asked.weights)
    layers = {name: it.weight for name, it in names.chosen(every, include, exclude).items()}
    if n_of_m is not None or block is not None or scope == "row":
        _check_axes(layers)
        check_fits(layers, n_of_m, block)
    if granularity == "channel":
        check_channels(layers)
    if asked is not None:
        notes = [f"which tensors are weights was asked of {asked.model}, which config.json names"]
    else:
        notes = ["which tensors are weights was told by their names: --dry-run lists them"]
        if joined is not None:
            notes.append(
                f"{joined.model} makes other tensors of {joined.joined!r} and its like when it is loaded: here each of "
                "the file's is a layer by itself, so that these need not be the masks of gp.prune on the loaded model"
            )
        if not config and (n_of_m is not None or block is not None or scope == "row"):
            notes.append("no config.json lies beside it: matrices are taken as stored [out, in]")
        if len(layers) > 1 and scope in ("global", "lamp") and n_of_m is None and threshold is None:
            notes.append("of equal magnitudes in two tensors, the one goes whose name comes first")
    tensors = {name: checkpoint.tensors[name] for name in layers}
    return _Job(every, tensors, Units(layers, block, None), sparsity, scope, n_of_m, threshold, min_keep, tuple(notes))


def _check_axes(layers: Mapping[str, Weight]) -> None:
    for name, weight in layers.items():
        require(
            weight.axes is not None,
            f"which axis of {name!r}, {tuple(weight.parameter.shape)}, is the output and which the input is not known "
            "from a file: exclude it, or load the model and call gp.prune",
        )


def _write(
    checkpoint: Checkpoint, order: Iterable[str], found: Mapping[str, Way], place: Callable[[str], Any], seen: Seen
) -> dict[str, int]:
    """Write all parts, tensors in the given order; return how many weights stay of those that are pruned."""
    kept = dict.fromkeys(found, 0)
    with ExitStack() as stack:
        outputs = {part.name: stack.enter_context(Output(place(part.name), part.header)) for part in checkpoint.parts}
        threads = threads_of_torch()
        later = stack.enter_context(behind(threads))
        slabs = ((name, at) for name in order for at in _slabs(checkpoint.tensors[name], found.get(name)))

        def read(slab: tuple[str, tuple[int, int]]) -> tuple[Tensors, int, Any]:
            t, (start, stop) = checkpoint.tensors[slab[0]], slab[1]
            return t, start, t.part.read(t.entry, start, stop)

        for t, start, raw in mapped(read, slabs, min(threads, 2)):
            name = t.entry.name
            if name in found:
                mask = found[name].decide(raw, start)
                bits = raw.view(f"i{DTYPES[t.entry.dtype].itemsize}")
                if bits.size == mask.size:
                    kept[name] += int(np.count_nonzero(mask))
                    np.multiply(bits, mask.view(np.int8), out=bits)
                else:
                    runs = bits.reshape(mask.size, -1)
                    kept[name] += int(np.count_nonzero(mask)) * runs.shape[1]
                    runs[~mask] = 0
            later(outputs[t.part.name].write, name, start, raw)
            seen(raw.size)
        for part in checkpoint.parts:
            part.check()
    return kept


def _slabs(t: Tensors, way: Way | None) -> Iterator[tuple[int, int]]:
    step = 4 * VALUES if way is None else way.slab
    return spans(t.entry, step)
