"""How long does a layer take with some of its output channels only, on this machine?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradprune.core.checks import require
from gradprune.core.evaluate import call, evaluated
from gradprune.core.layers import Weight

_CONVOLUTIONS = {nn.Conv1d: functional.conv1d, nn.Conv2d: functional.conv2d, nn.Conv3d: functional.conv3d}
ROUNDS, LEAST = 15, 0.001  # and the least seconds of each time


def seconds_here(
    model: nn.Module, example: Any, layers: Mapping[str, Weight], channels: Mapping[str, Iterable[int]]
) -> tuple[float, dict[str, dict[int, float]]]:
    """Return the median time of a forward pass in eval mode, and of each layer's share of it by its channels.

    All are timed in turn, ROUNDS times, so that what else the machine does meanwhile meets all alike. ValueError where
    a layer is of a kind that cannot be made narrower by itself.
    """
    for name, weight in layers.items():
        kind = type(weight.module)
        known = kind is nn.Linear or (kind in _CONVOLUTIONS and getattr(weight.module, "groups", 0) == 1)
        require(known, f"the time of {name!r}, in a {kind.__name__}, is not known: give seconds=, or exclude it")
    inputs = _inputs(model, example, [weight.module for weight in layers.values()])
    runs: dict[tuple[str, int] | None, Callable[[], Any]] = {None: lambda: call(model, example)}
    runs |= {
        (name, count): _narrow(weight.module, inputs[weight.module], count)
        for name, weight in layers.items()
        for count in channels[name]
        if count
    }
    with evaluated(model), torch.no_grad():
        found = _medians(runs)
    by_layer = {name: {count: found.get((name, count), 0.0) for count in channels[name]} for name in layers}
    return found[None], {name: falling(row) for name, row in by_layer.items()}


def _inputs(model: nn.Module, example: Any, modules: list[nn.Module]) -> dict[nn.Module, list[Tensor]]:
    """What each module gets in a forward pass, once for each time that it runs."""
    seen: dict[nn.Module, list[Tensor]] = {module: [] for module in modules}
    hooks = [m.register_forward_pre_hook(lambda module, args: seen[module].append(args[0].detach())) for m in modules]
    try:
        with evaluated(model), torch.no_grad():
            call(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _narrow(module: Any, inputs: list[Tensor], channels: int) -> Callable[[], None]:
    """What runs so many of a module's channels over all its inputs."""
    weight = module.weight.detach()[:channels].clone()
    bias = None if module.bias is None else module.bias.detach()[:channels].clone()

    def run() -> None:
        for x in inputs:
            if isinstance(module, nn.Linear):
                functional.linear(x, weight, bias)
            else:
                kind = _CONVOLUTIONS[type(module)]
                kind(x, weight, bias, module.stride, module.padding, module.dilation, 1)

    return run


def _medians(runs: Mapping[Any, Callable[[], Any]]) -> dict[Any, float]:
    from torch.utils.benchmark import Timer

    threads = torch.get_num_threads()
    timers = {name: Timer("run()", globals={"run": run}, num_threads=threads) for name, run in runs.items()}
    numbers = {n: max(1, math.ceil(LEAST / max(timer.timeit(1).median, 1e-9))) for n, timer in timers.items()}
    times: dict[Any, list[float]] = {name: [] for name in timers}
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            times[name].append(timer.timeit(numbers[name]).median)
    return {name: statistics.median(several) for name, several in times.items()}


def falling(seconds: Mapping[int, float]) -> dict[int, float]:
    """Return the times, none above that of more channels: it is chance, or the wider layer can do its work."""
    found: dict[int, float] = {}
    least = float("inf")
    for count in sorted(seconds, reverse=True):
        least = min(least, seconds[count])
        found[count] = least
    return found
