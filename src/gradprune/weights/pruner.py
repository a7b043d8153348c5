"""Prune while a network trains, by a schedule, and let pruned weights come back (chapter 5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradprune.core.checks import require
from gradprune.core.masked import count_kept
from gradprune.core.select import keep_largest
from gradprune.weights.granularity import parse_granularity
from gradprune.weights.hold import Hold
from gradprune.weights.mask import Masks
from gradprune.weights.plan import prepare
from gradprune.weights.prune import AsPrune, Score, prune, ranked_by
from gradprune.weights.score import magnitude


@dataclass(frozen=True)
class Regrow:
    """Let pruned weights come back: every `every` steps each layer swaps a fraction of its weights.

    Of the k weights that a layer keeps, the ``int(fraction * k)`` with the lowest score go, and as many come back, at
    zero, from among those pruned before: the ones that score highest by `by`. ``by=gp.gradient`` grows where the
    gradient is large, which is RigL; ``by=gp.random`` grows anywhere, which is SET. `fraction` is a number in [0, 1] or
    a function of the step, such as a decay to 0.
    Raises ValueError where `every` is not positive or a number given as `fraction` is not in [0, 1].
    Evci et al. (2020), section 3; Mocanu et al. (2018), algorithm 1; chapter 5.
    """

    by: Score
    fraction: float | Callable[[int], float] = 0.3
    every: int = 100

    def __post_init__(self) -> None:
        require(self.every >= 1, f"every must be at least 1, got {self.every}")
        if not callable(self.fraction):
            require(0.0 <= self.fraction <= 1.0, f"fraction must be in [0, 1], got {self.fraction}")

    def share(self, step: int) -> float:
        """The fraction to swap after `step` steps; 0 between the events."""
        if step % self.every:
            return 0.0
        return self.fraction(step) if callable(self.fraction) else self.fraction


class Event(NamedTuple):
    """What one pruning event changed: how many weights of each parameter went, and how many came back."""

    step: int
    amount: float
    removed: dict[str, int]
    regrown: dict[str, int]


class Pruner:
    """Prune `model` while `optimizer` trains it, by a schedule; it rides on the optimizer's own step hook.

    `schedule` is a function from the number of steps taken to the wanted amount (``gradprune.schedule``, or any
    callable); where its value changes, ``prune`` is called with that amount and the new masks are held. Step 0 is
    the construction. `amount` says what the schedule gives: ``"sparsity"`` or ``"threshold"``. Pruned weights stay
    pruned unless `regrow` is given. A step that an AMP scaler skips is no step. The further arguments are those of
    ``prune``: scope, granularity, include, exclude, min_keep.

    ``masks`` are the masks now, ``step`` the steps taken, ``events`` the list of what each event removed where.
    With ``state_dict`` and ``load_state_dict``, beside the model's and the optimizer's own, a run resumed from a
    checkpoint goes on with the same masks and weights, bit for bit.

    Raises ValueError, before anything is changed, as ``prune`` does. A schedule that falls is a ValueError at the
    step where it does. Zhu and Gupta (2017); chapter 5.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: Callable[[int], float],
        score: Score = magnitude,
        *,
        amount: Literal["sparsity", "threshold"] = "sparsity",
        regrow: Regrow | None = None,
        **as_prune: Unpack[AsPrune],
    ) -> None:
        granularity, scope = as_prune.get("granularity", "weight"), as_prune.get("scope", "global")
        require(amount in ("sparsity", "threshold"), f'amount must be "sparsity" or "threshold", got {amount!r}')
        require(
            regrow is None or granularity == "weight",
            f"regrow needs granularity 'weight', got {granularity!r}",
        )
        require(not isinstance(scope, Mapping), "a schedule and a scope with sparsities by name exclude each other")
        self.model, self.schedule, self.score, self.regrow = model, schedule, score, regrow
        self._kind, self._optimizer = amount, optimizer
        self._as_prune = as_prune
        first = schedule(0)
        layers, _ = prepare(model, **self._amount(first), **self._as_prune)
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        require(any(id(p) in owned for p in layers.values()), f"the optimizer owns none of {list(layers)}")
        self.step, self.amount = 0, 0.0
        self.events: list[Event] = []
        self.masks = Masks({name: torch.ones_like(p, dtype=torch.bool) for name, p in layers.items()})
        self._growth: Mapping[str, Tensor] | None = None
        # In this order: growth is scored on the gradients as they are, before the hold masks them, and an event comes
        # after the hold's look at the weights.
        before = optimizer.register_step_pre_hook(self._before_step)
        self._hold: Hold = self.masks.apply_(model).hold(optimizer)
        self._hooks = [before, optimizer.register_step_post_hook(self._after_step)]
        if first:
            try:
                self._prune_to(first)
            except BaseException:
                self.remove()
                raise

    def remove(self) -> None:
        """Stop pruning and holding; masks, events and weights stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hold.remove()

    def state_dict(self) -> dict[str, Any]:
        """Step, amount, events and bit-packed masks: what ``load_state_dict`` needs to go on from here."""
        return {
            "step": self.step,
            "amount": self.amount,
            "masks": self.masks.state_dict(),
            "events": [event._asdict() for event in self.events],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state` was taken: its masks are applied to the model and held.

        Raises ValueError, before anything is changed, where the masks are not for this pruner's parameters.
        """
        masks = Masks.from_state_dict(state["masks"])
        if {n: m.shape for n, m in masks.items()} != {n: m.shape for n, m in self.masks.items()}:
            raise ValueError(f"the state has masks for {list(masks)}, this pruner prunes {list(self.masks)}")
        masks = Masks({name: mask.to(self.masks[name].device) for name, mask in masks.items()})
        self.step, self.amount = state["step"], state["amount"]
        self.events = [Event(**event) for event in state["events"]]
        self._hold_from_now(masks)

    def _amount(self, value: float) -> dict[str, Any]:
        """As an argument of prune. N:M is a sparsity by itself, reached at whatever step the schedule leaves 0."""
        n_of_m, _ = parse_granularity(self._as_prune.get("granularity", "weight"))
        return {} if n_of_m is not None and value == 0 else {self._kind: value}

    def _before_step(self, *_: Any) -> None:
        if self.regrow is not None and self.regrow.share(self.step + 1) > 0 and self.masks.sparsity > 0:
            self._growth = self.regrow.by(self.model)  # now, as the hold is about to mask the gradients

    def _after_step(self, *_: Any) -> None:
        self.step += 1
        wanted = self.schedule(self.step)
        if wanted != self.amount:
            self._prune_to(wanted)
        if self._growth is not None and self.regrow is not None:
            growth, self._growth = self._growth, None
            self._swap(growth, self.regrow.share(self.step))

    def _prune_to(self, amount: float) -> None:
        if amount < self.amount and self._kind == "sparsity":
            raise ValueError(
                f"the schedule falls from {self.amount} to {amount} at step {self.step}; pruned weights come back only "
                "by regrow"
            )
        within = self.masks if self.masks.sparsity else None
        masks = prune(self.model, self.score, **self._amount(amount), **self._as_prune, within=within)
        self.amount = amount
        self._log(masks)
        self._hold_from_now(masks)

    def _swap(self, growth: Mapping[str, Tensor], share: float) -> None:
        layers = {name: self.model.get_parameter(name) for name in self.masks}
        ranked = ranked_by(self.score, self.model, layers)
        masks = {}
        for name, active in self.masks.items():
            count = min(int(share * count_kept(active)), active.numel() - count_kept(active))
            stay = keep_largest({name: ranked.values[name]}, count_kept(active) - count, by=ranked.by, among=[active])[
                0
            ]
            masks[name] = stay | keep_largest({name: growth[name].detach()}, count, among=[~active])[0]
        self._log(Masks(masks))
        self._hold_from_now(Masks(masks))

    def _log(self, masks: Masks) -> None:
        removed = {name: count_kept(self.masks[name] & ~mask) for name, mask in masks.items()}
        regrown = {name: count_kept(mask & ~self.masks[name]) for name, mask in masks.items()}
        self.events.append(Event(self.step, self.amount, removed, regrown))

    def _hold_from_now(self, masks: Masks) -> None:
        self.masks = masks.apply_(self.model)
        self._hold = masks.hold(self._optimizer)  # replaces the one before
