"""What does torch answer where the page's layers must: each alone, and in networks of several?"""

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import gradprune as gp
from gradprune.lab.live.figure import halves as packed
from gradprune.lab.models import ACTIVATIONS
from gradprune.lab.zoo.sequences import Attention

Case = dict[str, Any]


class Last(nn.Module):
    """The last state of torch's recurrent layer."""

    def __init__(self, inputs: int, width: int, steps: int) -> None:
        super().__init__()
        self.shape = steps, inputs
        self.layer = nn.RNN(inputs, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.view(-1, *self.shape))[0][:, -1]


class Places(nn.Module):
    """A module at each place of a sequence, flat before and after."""

    def __init__(self, places: int, module: nn.Module) -> None:
        super().__init__()
        self.places, self.module = places, module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.view(len(x), self.places, -1)).flatten(1)


class Block(nn.Module):
    """x + attention(norm(x)), as a layer of gradprune.lab.zoo.sequences.Attention has it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return x + self.attention(normed, normed, normed, need_weights=False)[0]


class Shift(nn.Module):
    """A vector of its own for each place."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


class Mean(nn.Module):
    """The mean of several vectors."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.places = places

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), self.places, -1).mean(1)


def _convolution(channels: int, filters: int, side: int, kernel: int, stride: int, padding: int) -> tuple[Any, ...]:
    convolution = nn.Conv2d(channels, filters, kernel, stride, padding)
    module = nn.Sequential(nn.Unflatten(1, (channels, side, side)), convolution, nn.Flatten())
    window = {"kernel": kernel, "stride": stride, "padding": padding}
    return ["convolution", channels, filters, side, window], module, channels * side**2


def layers() -> list[Case]:
    """Return each kind of layer alone, in several shapes: what it takes, gives, and passes back."""
    made = [
        *((["dense", 6, 4], nn.Linear(6, 4), 6), (["dense", 5, 7, 3], Places(3, nn.Linear(5, 7)), 15)),
        *((["activation", 9, name], module(), 9) for name, module in ACTIVATIONS.items()),
        (["place", 12], Shift(12), 12),
        *((["mean", 5, places], Mean(places), 5 * places) for places in (1, 4)),
        *(_convolution(*shape) for shape in ((1, 3, 8, 3, 2, 1), (2, 5, 4, 3, 2, 1), (3, 2, 5, 2, 1, 0))),
        *(_convolution(*shape) for shape in ((2, 2, 2, 3, 2, 1), (1, 4, 6, 1, 1, 0), (2, 3, 7, 4, 3, 2))),
        *((["recurrent", a, b, c], Last(a, b, c), a * c) for a, b, c in ((3, 5, 4), (8, 6, 8), (2, 2, 1), (1, 7, 3))),
        *(
            (["attention", width, heads, places], Places(places, Block(width, heads)), width * places)
            for width, heads, places in ((6, 1, 4), (8, 4, 3), (6, 3, 1), (32, 4, 8))
        ),
    ]
    return [_case([spec], module, inputs, rows) for (spec, module, inputs), rows in itertools.product(made, (1, 5))]


def networks() -> list[Case]:
    """Return networks of several layers."""
    width, places = 8, 8
    attention = Attention(width=width, heads=2, layers=1)
    specs = [["dense", 8, width, places], ["place", width * places], ["attention", width, 2, places]]
    convolution, module, inputs = _convolution(1, 3, 8, 3, 2, 1)
    more, second, _ = _convolution(3, 4, 4, 3, 2, 1)
    deep = nn.Sequential(module, nn.ReLU(), second, nn.ReLU(), nn.Linear(16, 10))
    return [
        _case([*specs, ["mean", width, places], ["dense", width, 10]], attention, 64, 6),
        _case(
            [convolution, ["activation", 48, "relu"], more, ["activation", 16, "relu"], ["dense", 16, 10]],
            deep,
            inputs,
            6,
        ),
        _case([["recurrent", 8, 6, 8], ["dense", 6, 10]], nn.Sequential(Last(8, 6, 8), nn.Linear(6, 10)), 64, 6),
        _case(
            [["dense", 6, 5], ["activation", 5, "tanh"], ["dense", 5, 3]],
            nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
            6,
            4,
        ),
    ]


def _case(specs: list[Any], module: nn.Module, inputs: int, rows: int) -> Case:
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():  # biases and norms, too, as training may leave them
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(rows, inputs, dtype=torch.float64, requires_grad=True)
    out = module(x)
    upstream = torch.randn_like(out)
    below, *gradients = torch.autograd.grad(out, [x, *module.parameters()], upstream)
    pruned = gp.prune(module, sparsity=0.0) if any(_prunable(p) for p in module.parameters()) else {}
    return {
        "name": f"{specs}, {rows} rows",
        "layers": specs,
        "rows": rows,
        "parameters": _numbers(*module.parameters()),
        "weights": [mask.numel() for mask in pruned.values()],
        "inputs": _numbers(x),
        "out": _numbers(out),
        "upstream": _numbers(upstream),
        "gradients": [_numbers(gradient) for gradient in gradients],
        "below": _numbers(below),
    }


def _prunable(parameter: nn.Parameter) -> bool:
    return parameter.dim() > 1


def halves() -> list[Case]:
    """Return numbers of half precision, as bytes and as they are."""
    tiny = 2.0**-24
    edges = torch.tensor([0.0, 1.0, -1.0, tiny, -tiny, 1023 * tiny, 1024 * tiny, 65504.0, -65504.0, 0.1])
    cases = {"edges": edges, "drawn": torch.randn(500) * 10.0 ** torch.randint(-7, 4, (500,))}
    return [
        {"name": name, "bytes": list(packed(numbers.half())), "numbers": _numbers(numbers.half().double())}
        for name, numbers in cases.items()
    ]


def adam() -> list[Case]:
    """Return twenty steps of torch's Adam on given gradients, free and under held masks."""
    settings = ((0.01, (0.9, 0.999)), (0.1, (0.5, 0.9)), (0.03, (0.0, 0.99)))
    return [_steps(rate, betas, held) for (rate, betas), held in itertools.product(settings, (False, True))]


def _steps(rate: float, betas: tuple[float, float], held: bool) -> Case:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=betas)
    masks = gp.prune(model, sparsity=0.6) if held else None
    if masks is not None:
        masks.hold(optimizer)
    parameters, gradients = _numbers(*model.parameters()), []
    for step in range(20):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / 20)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * 10.0 ** torch.randint(-4, 3, ()).item()
        gradients.append(_numbers(*(parameter.grad for parameter in model.parameters())))
        optimizer.step()
    return {
        "name": f"rate {rate}, betas {betas}, {'held' if held else 'free'}",
        "layers": [["dense", 6, 5], ["activation", 5, "relu"], ["dense", 5, 3]],
        "parameters": parameters,
        "gradients": gradients,
        "rate": rate,
        "betas": betas,
        "masks": None if masks is None else [mask.flatten().int().tolist() for mask in masks.values()],
        "after": _numbers(*model.parameters()),
    }


def trainings() -> list[Case]:
    """Return ten steps of Adam on the same rows, by cross-entropy, of each network, half of its weights gone."""
    return [_trained(specs, module) for specs, module in _trainable()]


def _trainable() -> list[tuple[list[Any], nn.Module]]:
    attention = Attention(width=8, heads=2, layers=1)
    tokens = [["dense", 8, 8, 8], ["place", 64], ["attention", 8, 2, 8], ["mean", 8, 8], ["dense", 8, 10]]
    convolution, module, _ = _convolution(1, 3, 8, 3, 2, 1)
    return [
        (tokens, attention),
        ([["recurrent", 8, 6, 8], ["dense", 6, 10]], nn.Sequential(Last(8, 6, 8), nn.Linear(6, 10))),
        (
            [convolution, ["activation", 48, "relu"], ["dense", 48, 10]],
            nn.Sequential(module, nn.ReLU(), nn.Linear(48, 10)),
        ),
    ]


def _trained(specs: list[Any], model: nn.Module) -> Case:
    model = model.double()
    masks = gp.prune(model, sparsity=0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    masks.hold(optimizer)
    parameters = _numbers(*model.parameters())
    x, y = torch.randn(12, 64).double(), torch.randint(10, (12,))  # inputs are kept in single precision
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {
        "name": str(specs),
        "layers": specs,
        "parameters": parameters,
        "inputs": _numbers(x),
        "labels": y.tolist(),
        "masks": [mask.flatten().int().tolist() for mask in masks.values()],
        "losses": losses,
        "after": _numbers(*model.parameters()),
    }


def _numbers(*tensors: Tensor | None) -> list[float]:
    return [number for tensor in tensors if tensor is not None for number in tensor.detach().flatten().tolist()]
