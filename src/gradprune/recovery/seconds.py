"""How long does a layer take with some of its output channels only, on this machine?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradprune.core.checks import require
from gradprune.core.evaluate import call, evaluated
from gradprune.core.layers import Weight

_CONVOLUTIONS = {nn.Conv1d: functional.conv1d, nn.Conv2d: functional.conv2d, nn.Conv3d: functional.conv3d}


def model_seconds(model: nn.Module, example: Any) -> float:
    """Return the median time of a forward pass, in eval mode."""
    with evaluated(model), torch.no_grad():
        return _median("call(model, example)", {"call": call, "model": model, "example": example}, 0.2)


def layer_seconds(
    model: nn.Module, example: Any, layers: Mapping[str, Weight], channels: Mapping[str, Iterable[int]]
) -> dict[str, dict[int, float]]:
    """Return for each layer, by the number of its channels, the median time of its share of a forward pass.

    ValueError where a layer is of a kind that cannot be made narrower by itself.
    """
    for name, weight in layers.items():
        kind = type(weight.module)
        known = kind is nn.Linear or (kind in _CONVOLUTIONS and getattr(weight.module, "groups", 0) == 1)
        require(known, f"the time of {name!r}, in a {kind.__name__}, is not known: give seconds=, or exclude it")
    inputs = _inputs(model, example, [weight.module for weight in layers.values()])
    with evaluated(model), torch.no_grad():
        return {
            name: _falling({count: _seconds(weight.module, inputs[weight.module], count) for count in channels[name]})
            for name, weight in layers.items()
        }


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


def _seconds(module: Any, inputs: list[Tensor], channels: int) -> float:
    """The time of so many of a module's channels, over all its inputs; none take none."""
    if not channels:
        return 0.0
    weight = module.weight.detach()[:channels].clone()
    bias = None if module.bias is None else module.bias.detach()[:channels].clone()

    def run() -> None:
        for x in inputs:
            if isinstance(module, nn.Linear):
                functional.linear(x, weight, bias)
            else:
                kind = _CONVOLUTIONS[type(module)]
                kind(x, weight, bias, module.stride, module.padding, module.dilation, 1)

    return _median("run()", {"run": run}, 0.02)


def _median(statement: str, names: Mapping[str, Any], least: float) -> float:
    from torch.utils.benchmark import Timer

    timer = Timer(statement, globals=dict(names), num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=least).median)


def _falling(seconds: Mapping[int, float]) -> dict[int, float]:
    """No time above that of more channels: what is measured so is chance, and the wider layer can do its work."""
    found: dict[int, float] = {}
    least = float("inf")
    for count in sorted(seconds, reverse=True):
        least = min(least, seconds[count])
        found[count] = least
    return found
