"""How is a model scored whose parameters are spread over several processes (chapter 9)?

A score then is a tensor for each parameter that lies as the parameter does. What looks at data runs the model on each
rank's own batches and takes the gradients as the model leaves them: FSDP2 averages them over the ranks. All ranks call
a score together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradprune.core.agree import agree, equal_on_all
from gradprune.core.ranks import Ranks, ranks_of
from gradprune.core.sharded import Shard, layout, like, local, reshard_, together
from gradprune.weights.differentiate import Batches, Loss, floating, loss_of, pairs, trainable
from gradprune.weights.precision import wide

CALLED = "a score of sharded parameters"
_PIECE = 2**17  # lots that are drawn at a time
Work = Callable[[frozenset[str]], dict[str, Tensor]]


def settled(work: Work, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return scores in one dtype on all ranks, spread as their parameters are.

    `work` returns what is held here; those named in its argument in float64, which another rank has needed.
    """
    found, told = agree(CALLED, lambda: _with_dtypes(work(frozenset())))
    if not equal_on_all(told):
        exact = frozenset(name for name in found if any(dtypes.get(name) == torch.float64 for dtypes in told))
        found, _ = agree(CALLED, lambda: _with_dtypes(work(exact)))
    return {name: like(parameters[name], score) for name, score in found.items()}


def _with_dtypes(scores: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, object], dict[str, torch.dtype]]:
    return scores, {}, {name: score.dtype for name, score in scores.items()}


def stored_gradients(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what is held here of the gradients in ``.grad``; zero where a parameter has none."""
    found = {name: _held(p.grad, p) for name, p in parameters.items() if p.grad is not None}
    if not found:
        raise ValueError("no parameter holds a gradient: call backward() first, or pass batches and loss")
    return {name: found[name] if name in found else torch.zeros_like(local(p)) for name, p in parameters.items()}


def mean_gradients(model: nn.Module, batches: Batches, loss: Loss) -> dict[str, Tensor]:
    """Return what is held here of the gradients of the mean loss over the batches of all ranks, as many on each."""
    every = list(model.parameters())
    before = [p.grad for p in every]
    with trainable(model, sharded=True) as parameters:
        try:
            kept, _ = agree(CALLED, lambda: _counted(pairs(batches)))
            mean = {name: torch.zeros_like(local(p), dtype=wide(p.dtype)) for name, p in parameters.items()}
            for batch in kept:
                for p in every:
                    p.grad = None
                value, _ = agree(CALLED, lambda: (loss_of(model, batch, loss), {}, None))  # noqa: B023 (used at once)
                value.backward()  # autograd.grad would pass by FSDP2, which reduces what goes into .grad
                for name, p in parameters.items():
                    if p.grad is not None:
                        mean[name].add_(_held(p.grad, p).detach(), alpha=1 / len(kept))
        finally:
            for p, gradient in zip(every, before, strict=True):
                p.grad = gradient
            reshard_(model)
    return mean


def _counted(kept: list[Any]) -> tuple[list[Any], dict[str, object], None]:
    return kept, {"batches, by their number,": len(kept)}, None


def _held(gradient: Tensor, parameter: Tensor) -> Tensor:
    """What is held here of a gradient, once it lies as its parameter does."""
    if layout(gradient) != layout(parameter):
        gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
    held = local(gradient)
    return held.wait() if type(held).__name__ == "AsyncCollectiveTensor" else held  # type: ignore[attr-defined]


def random_over_ranks(model: nn.Module, generator: torch.Generator | None) -> dict[str, Tensor]:
    """Return the lots that ``random`` would draw in one process from the first rank's generator.

    Each rank draws all of them, and keeps those of its blocks. Where the CPU draws, a piece at a time; elsewhere, where
    lots drawn in pieces would be others, those of one parameter at a time, four bytes an entry.
    """
    reshard_(model)
    parameters = floating(model, sharded=True)
    _, shards = together(lambda: (None, {}, parameters))
    ranks, lots, twins = ranks_of(parameters.values()), {}, dict[torch.device, torch.Generator]()
    began: dict[torch.device, tuple[torch.Generator, bool]] = {}
    for name, p in parameters.items():
        own = generator or _default_generator(p.device)
        if own.device not in twins:
            first = ranks.first(own.get_state())
            twins[own.device] = torch.Generator(own.device).set_state(first)
            began[own.device] = own, torch.equal(first, own.get_state())
        lots[name] = like(p, _drawn(shards[name], twins[own.device]).to(p.device))
    for device, (own, alike) in began.items():
        if alike:  # the others' chance stays their own
            own.set_state(twins[device].get_state())
    return lots


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    backend = getattr(torch, device.type)
    return backend.default_generators[backend.current_device()]  # type: ignore[no-any-return]


def _drawn(shard: Shard, generator: torch.Generator) -> Tensor:
    """The lots of a block, of those that are drawn for the whole."""
    found = torch.empty(shard.local.numel(), dtype=torch.float32, device=generator.device)
    most = _PIECE if generator.device.type == "cpu" else max(1, shard.numel)
    begin = 0
    for start in range(0, shard.numel, most):
        size = min(most, shard.numel - start)
        some = torch.rand(size, generator=generator, device=generator.device, dtype=torch.float32)
        end = _first_from(shard, start + size, begin)
        here = torch.arange(begin, end, device=generator.device)
        found[begin:end] = some[shard.positions(here) - start]
        begin = end
    return found.view(shard.local.shape)


def _first_from(shard: Shard, place: int, least: int) -> int:
    """The first entry of a block, from `least` on, that stands at `place` or later in the whole."""
    low, high = least, shard.local.numel()
    while low < high:
        middle = (low + high) // 2
        at = int(shard.positions(torch.tensor([middle], device="cpu")))
        low, high = (middle + 1, high) if at < place else (low, middle)
    return low


def sum_over_ranks(scores: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> float:
    """Return the sum of all entries of scores held here by blocks."""
    _, shards = together(lambda: (None, {}, parameters))
    ranks: Ranks = ranks_of(parameters.values())
    own = [float(scores[name].double().sum()) if shard.owned else 0.0 for name, shard in shards.items()]
    return float(ranks.sum(torch.tensor(own, dtype=torch.float64, device="cpu")).sum())
