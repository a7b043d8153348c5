"""How do several workers train one network: in step, averaged now and then, or each as it comes to shared weights?

All in one process, one worker after the other, so that what is seen does not depend on which comes first. The page has
the same in crew.js.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

import gradprune as gp
from gradprune.lab.data import Split

WORKERS = 4
GROUPS: dict[str, list[list[int]]] = {  # who takes each step together; of "asynchronous", nobody
    "synchronous": [[0, 1, 2, 3]],
    "local": [[0], [1], [2], [3]],
    "pairs": [[0, 1], [2, 3]],
    "asynchronous": [],
}
AVERAGED = ("local", "pairs")
RATE, MOMENTUM, BATCH = 0.05, 0.9, 64  # as workers.js has them


class Crew:
    """Four workers that train copies of `model`, or one that they share, each on its part of every batch.

    `way` is one of GROUPS; `period`, the steps between two averages; `age`, how many steps old the weights are at which
    an asynchronous worker computes its gradient; `density`, the share of the entries that is sent, the others wait.
    Asynchronous workers, each of which steps, have a quarter of the rate.

    Raises ValueError for an unknown way, a period below 1 or an age below 0.
    """

    def __init__(
        self, model: nn.Module, way: str = "local", *, period: int = 8, age: int = 0, density: float = 1.0
    ) -> None:
        if way not in GROUPS:
            raise ValueError(f"way must be one of {', '.join(GROUPS)}, got {way!r}")
        if period < 1 or age < 0:
            raise ValueError(f"period must be at least 1 and age at least 0, got {period} and {age}")
        self.way, self.period, self.density, self.steps = way, period, density, 0
        self.shared = way == "asynchronous"
        memory = copy.deepcopy(model)
        self.models = [memory if self.shared else copy.deepcopy(model) for _ in range(WORKERS)]
        rate = RATE / WORKERS if self.shared else RATE
        self.optimizers = [torch.optim.SGD(m.parameters(), lr=rate, momentum=MOMENTUM) for m in self.models]
        self.known = [copy.deepcopy(model) for _ in range(WORKERS)]  # what the others last heard of each
        self.waiting = [gp.ErrorFeedback(m, density) for m in self.models]
        self.late = [gp.ErrorFeedback(m, density) for m in self.known]
        self.past = [copy.deepcopy(model) for _ in range(WORKERS * age if self.shared else 0)]
        self.masks: list[gp.Masks] = []
        self.touched: dict[str, Tensor] = {}

    def step(self, data: Split, rows: Tensor) -> None:
        """Take one step on these rows of `data`, of which each worker sees its part."""
        parts = rows.tensor_split(WORKERS)
        self.touched = {}
        for group in GROUPS[self.way]:
            for p in group:
                self._differentiate(p, self.models[p], data, parts[p])
            if len(group) > 1:
                for p in group:
                    self._send(p)
                _average(*([q.grad for q in self.models[p].parameters()] for p in group))
            for p in group:
                self.optimizers[p].step()
        for p in range(WORKERS if self.shared else 0):
            self._step_shared(p, data, parts[p])
        self.steps += 1

    def average_when_due(self) -> bool:
        """Average the weights of all where it is time for that, and return whether it was."""
        if self.way not in AVERAGED or self.steps % self.period:
            return False
        with torch.no_grad():
            for model, known, late in zip(self.models, self.known, self.late, strict=True):
                pairs = list(zip(model.parameters(), known.parameters(), strict=True))
                for new, old in pairs:
                    old.grad = new - old
                if self.density < 1:
                    late.step()
                for _, old in pairs:
                    old.add_(cast(Tensor, old.grad))
            _average(*(list(known.parameters()) for known in self.known))
            for model, known in zip(self.models, self.known, strict=True):
                model.load_state_dict(known.state_dict())
        return True

    def prune(self, sparsity: float, decides: Literal["each", "one"]) -> None:
        """Remove the smallest weights: every worker of those that it has, or last read, or the first one for all."""
        seen = [copy.deepcopy(model) for model in self.past[:WORKERS] or self.models]
        chosen = [gp.prune(model, sparsity=sparsity, min_keep=1) for model in seen]
        self.masks = chosen if decides == "each" else chosen[:1] * WORKERS
        for p, masks in enumerate(self.masks):
            masks.hold(self.optimizers[p], self.models[p])
            masks.apply_(self.known[p])
            for feedback in (self.waiting[p], self.late[p]):
                waits = feedback.state_dict()
                for name in waits["residuals"].keys() & masks.keys():
                    waits["residuals"][name] = waits["residuals"][name] * masks[name]
                feedback.load_state_dict(waits)

    def differing(self) -> int:
        """Return in how many weights the workers' masks are not all the same."""
        kept = [torch.stack([masks[name] for masks in self.masks]) for name in self.masks[0]]
        return sum(int((each.any(0) & ~each.all(0)).sum()) for each in kept)

    def zeros(self) -> int:
        """Return how many weights are zero for the first worker; if shared, after every worker's latest step."""
        weights = self.touched or {name: self.models[0].get_parameter(name) for name in self.masks[0]}
        return sum(int((weight == 0).sum()) for weight in weights.values())

    def _step_shared(self, p: int, data: Split, rows: Tensor) -> None:
        model = self.models[p]
        self._differentiate(p, self.past[0] if self.past else model, data, rows)
        self._send(p)
        self.optimizers[p].step()
        if self.past:
            self.past = [*self.past[1:], copy.deepcopy(model)]
        for name in self.masks[p] if self.masks else ():
            alive = model.get_parameter(name) != 0
            self.touched[name] = self.touched[name] | alive if name in self.touched else alive

    def _differentiate(self, p: int, at: nn.Module, data: Split, rows: Tensor) -> None:
        """Give worker p's model its gradient on these rows, at weights that may be older."""
        loss = functional.cross_entropy(at(data.x[rows]), data.y[rows])
        gradients = torch.autograd.grad(loss, list(at.parameters()))
        for parameter, gradient in zip(self.models[p].parameters(), gradients, strict=True):
            parameter.grad = gradient

    def _send(self, p: int) -> None:
        """Leave of worker p's gradient what is sent, nothing of it for pruned weights."""
        if self.masks:
            self.masks[p].mask_gradients_(self.models[p])
        if self.density < 1:
            self.waiting[p].step()


def _average(*several: Sequence[Tensor | None]) -> None:
    """Write the mean of several lists of tensors into each."""
    with torch.no_grad():
        for same in zip(*several, strict=True):
            tensors = [tensor for tensor in same if tensor is not None]
            mean = torch.stack(tensors).mean(0)
            for tensor in tensors:
                tensor.copy_(mean)


def orders(rows: int, seed: int) -> Iterator[Tensor]:
    """Yield batches without end, shuffled anew each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(rows, generator=generator).split(BATCH)
