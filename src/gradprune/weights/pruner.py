"""Prune while a network trains, by a schedule, and let pruned weights come back (chapter 5)."""

from __future__ import annotations

import copy
import itertools
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, NoReturn, Unpack

from torch import Tensor, nn

from gradprune.core.agree import meet
from gradprune.core.checks import choice, fraction, function, module, number, require, state, warn, whole
from gradprune.core.masked import count_kept, zero_pruned_
from gradprune.core.replicas import alike, by_hash, replicas_of
from gradprune.core.select import keep_largest
from gradprune.core.steps import Optimizers, Steps, as_list, not_owned, parameters_of
from gradprune.weights.hold import Hold, warn_of_revived
from gradprune.weights.mask import Masks
from gradprune.weights.named import some
from gradprune.weights.prune import AsPrune, check_for_schedule
from gradprune.weights.regrow import Regrow, checked_regrow
from gradprune.weights.replicated import decided, over_ranks
from gradprune.weights.request import Request, Score, checked_score, ranked_by
from gradprune.weights.schedule import values_of
from gradprune.weights.score import magnitude
from gradprune.weights.shown import by_layer, in_all
from gradprune.weights.start import masks_before

Schedule = Callable[[int], float]
_EVENT = "an event of gp.Pruner"
WRITES_BEFORE_STEPS = 2  # that are no sign of another optimizer: initialising, loading
WRITES_BETWEEN_STEPS = 10  # likewise: an average put in and taken out again


class Event(NamedTuple):
    """What one pruning event changed: how many weights of each parameter went, and how many came back."""

    step: int
    amount: float
    removed: dict[str, int]
    regrown: dict[str, int]


class Pruner:
    """Prune `model` while `optimizer` trains it, by a schedule; it rides on the optimizer's own steps.

    Where the schedule's value changes, weights are pruned by ``prune`` and held at zero from then on. What is pruned
    already, held by an optimizer or zero in a layer that is not zero as a whole, stays pruned. A step that an AMP
    scaler skips is no step. Before the climb of a step in two halves (SAM), ``masks.mask_gradients_(model)`` keeps
    pruned weights out of it. Save ``state_dict()`` beside the model's and the optimizer's own: a run resumed from them
    goes on bit for bit. The masks are those of the parameters that were eligible when it was made, also where a layer
    is frozen later. Where DistributedDataParallel wraps the model, all ranks make it alike and decide each event
    together, as ``prune`` does. ``copy.deepcopy`` of model, optimizer and pruner together gives a pruner of the copies.

    It sees the steps of the optimizer it was given, not of one made later: then ``remove()`` it, and load its state
    into a new one. Weights that are written while no step is seen are warned of where `step`, `masks`, ``repr`` or the
    state is asked for, and only there.

    Args:
        model: what is pruned.
        optimizer: what steps, or a list of all optimizers that move weights of the model, of which the last counts the
            steps. Wrapped ones are looked into.
        schedule: from the number of steps taken to the amount wanted: ``gp.Cubic(...)`` and its like, or any function.
            Step 0 is the construction.
        score: as for ``prune``.
        amount: what the schedule gives, ``"sparsity"`` or ``"threshold"``.
        regrow: which pruned weights come back; none unless given.
        within: masks by name that say which weights may stay; ``{}`` for all, also those that are zero now.
        as_prune: scope, granularity, include, exclude and what else ``prune`` takes.

    Attributes:
        events: what each event removed where.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of range or does not fit, no optimizer given has one of the parameters, or one of
            them has a pruner already. Nothing has been changed then. A schedule that falls is refused at the step where
            it does.

    Example:
        >>> model = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> pruner = gp.Pruner(model, optimizer, gp.Cubic(final=0.9, begin=0, end=100))

    Zhu and Gupta (2017); chapter 5.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        schedule: Schedule,
        score: Score = magnitude,
        *,
        amount: Literal["sparsity", "threshold"] = "sparsity",
        regrow: Regrow | None = None,
        within: Mapping[str, Tensor] | None = None,
        **as_prune: Unpack[AsPrune],
    ) -> None:
        self._ranks = replicas_of(model)

        def checked() -> float:
            self.model, self._optimizers = module(model), as_list(optimizer)
            self.schedule = _checked_schedule(schedule)
            if values_of(score) is not None:  # type: ignore[arg-type]
                raise TypeError("score is a schedule: the order is Pruner(model, optimizer, schedule, score)")
            self.score = checked_score(score)
            self.regrow = checked_regrow(regrow, as_prune.get("granularity", "weight"))
            choice("amount", amount, ("sparsity", "threshold"))
            self._kind = amount
            check_for_schedule("Pruner", as_prune, own=("score", "regrow", "within"))
            self._request = Request.of(self.model, **as_prune)
            self._layers = self._request.parameters
            first = self._wanted(0)
            self._request.check_amounts(_amounts_of(schedule, first), self._kind)
            _require_owned(self._layers, self._optimizers)
            _require_no_other_pruner(self._layers)
            self._masks = masks_before(self._layers, within)
            return first

        def asked() -> dict[str, object]:
            swaps = None if regrow is None else (regrow.every, regrow.share(regrow.every))
            return {
                "schedule": _amounts_of(schedule, self._wanted(0)),
                "regrow": swaps,
                **as_prune,
                **by_hash(self._masks),
            }

        first = alike("gp.Pruner", self._ranks, asked, checked)
        self._step, self.amount = 0, 0.0
        self.events: list[Event] = []
        self._growth: Mapping[str, Tensor] | None = None
        masks = self._chosen(first) if first else self._masks
        self._log(masks, first)
        self._ride(masks)

    @property
    def masks(self) -> Masks:
        """The masks now; warns where a parameter is no longer the model's or the optimizer's, or no step is seen."""
        self._look_around()
        return self._masks

    @property
    def step(self) -> int:
        """How many steps were taken; warns where the optimizer has lost a parameter, or no step is seen."""
        self._warn_of_another_optimizer()
        return self._step

    def __repr__(self) -> str:
        self._look_around()
        events = f"{len(self.events)} event{'' if len(self.events) == 1 else 's'}"
        return f"Pruner(step {self._step}, {events}, {in_all(self._masks)}){by_layer(self._masks)}"

    def remove(self) -> None:
        """Stop pruning and holding; masks, events and weights stay as they are."""
        self._steps.remove()
        self._hold.remove()
        _PRUNERS.discard(self)

    def state_dict(self) -> dict[str, Any]:
        """Step, amount, events and bit-packed masks: what ``load_state_dict`` needs to go on from here."""
        self._look_around()
        warn_of_revived(self._layers)
        return {
            "step": self._step,
            "amount": self.amount,
            "masks": self._masks.state_dict(),
            "events": [event._asdict() for event in self.events],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from where the state was taken: its masks are applied to the model and held.

        Args:
            state_dict: what ``state_dict()`` returned, also of a pruner of another model of the same layers.

        Raises:
            TypeError, ValueError: it is no state of a Pruner, its masks are not for this pruner's parameters, or its
                sparsity is above what this pruner's schedule wants next. Nothing has been changed then.
        """

        def checked() -> tuple[int, float, list[Event], Masks]:
            state(state_dict, {"step": int, "amount": (int, float), "masks": Mapping, "events": list}, "Pruner")
            step = whole("the state's step", state_dict["step"], least=0)
            amount = number("the state's amount", state_dict["amount"], finite=False)
            events = [_event(entry) for entry in state_dict["events"]]
            masks = Masks.from_state_dict(state_dict["masks"])
            if {n: m.shape for n, m in masks.items()} != {n: m.shape for n, m in self._masks.items()}:
                raise ValueError(f"the state has masks for {list(masks)}, this pruner prunes {list(self._masks)}")
            masks = Masks({name: mask.to(self._layers[name].device) for name, mask in masks.items()})
            self._require_not_beyond(step, amount)
            return step, amount, events, masks

        step, amount, events, masks = alike("load_state_dict", self._ranks, lambda: _told(state_dict), checked)
        self._step, self.amount, self.events = step, amount, events
        self._hold_from_now(masks)

    def _require_not_beyond(self, step: int, amount: float) -> None:
        """Raise ValueError where the step after a loaded state would fall, as after another schedule."""
        if self._kind == "sparsity" and self._wanted(step + 1) < amount:
            raise ValueError(
                f"the state is that of a schedule at a sparsity of {amount:g} after {step} steps; this pruner's "
                f"schedule goes back to {self._wanted(step + 1):g} at the next: pruned weights come back only by regrow"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Pruner:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__ |= {k: v for k, v in self.__dict__.items() if k not in ("_steps", "_hold")}
        twin.model, twin._optimizers = copy.deepcopy((self.model, self._optimizers), memo)
        weights = self._request.layers.items()
        parts = {name: copy.deepcopy((w.parameter, w.module), memo) for name, w in weights}
        layers = {name: w._replace(parameter=parts[name][0], module=parts[name][1]) for name, w in weights}
        twin._request = replace(self._request, layers=layers)
        twin._layers = twin._request.parameters
        twin.events, twin._growth = list(self.events), None
        twin._masks = Masks({name: mask.clone() for name, mask in self._masks.items()})
        twin._ride(twin._masks)
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "a Pruner is not pickled or copied by itself, since it hangs on an optimizer: save its state_dict(), or "
            "copy.deepcopy((model, optimizer, pruner))"
        )

    # ------------------------------------------------------------------------------------------------------- steps

    def _ride(self, masks: Masks) -> None:
        """Set what is pruned to zero, and hang on the optimizers; nothing hangs there if that fails."""
        self._hold = Hold(self._optimizers, self._by_parameter(masks))
        try:
            # After the hold, so that an event comes after its look at the weights.
            self._steps = Steps(self._optimizers, gradients=self._score_growth, taken=self._after_step)
            self._begin_from(masks)
        except BaseException:
            self._hold.remove()
            raise
        _PRUNERS.add(self)

    def _score_growth(self) -> None:
        self._growth = None
        if self.regrow is not None and self.regrow.share(self._step + 1) > 0 and self._masks.sparsity > 0:
            by = self.regrow.by
            if self._ranks is not None:
                meet(_EVENT, self._ranks.group)
                by = over_ranks(by, self._ranks, _EVENT)
            self._growth = ranked_by(by, self.model, self._layers).scores()

    def _after_step(self) -> None:
        self._step += 1
        wanted = self._wanted(self._step)
        if wanted != self.amount:
            masks = self._chosen(wanted)
            self._log(masks, wanted)
            self._hold_from_now(masks)
        if self._growth is not None and self.regrow is not None:
            growth, self._growth = self._growth, None
            masks = self._decided(partial(self._swapped, growth, self.regrow.share(self._step)))
            self._log(masks, self.amount)
            self._hold_from_now(masks)
        self._written = {name: p._version for name, p in self._layers.items()}
        self._seen_step = True

    def _wanted(self, step: int) -> float:
        called = f"at step {step} the schedule's {self._kind}"
        value = self.schedule(step)
        return fraction(called, value) if self._kind == "sparsity" else number(called, value, finite=False)

    def _chosen(self, amount: float) -> Masks:
        """The masks for an amount, of what stays now; these as they are where they are sparse enough."""
        before = self._masks
        if self._kind == "sparsity":
            if amount < self.amount:
                raise ValueError(
                    f"the schedule falls from {self.amount} to {amount} at step {self._step}; pruned weights come back "
                    "only by regrow"
                )
            if before.sparsity >= amount:
                return before
        within = before if before.sparsity else None
        amounts: dict[str, Any] = self._request.amount(amount, self._kind)

        def choose(score: Score) -> Masks:
            masks = self._request.masks(self.model, score, within=within, **amounts)
            return Masks({name: mask & before[name] for name, mask in masks.items()})

        return self._decided(choose)

    def _decided(self, choose: Callable[[Score], Masks]) -> Masks:
        """What `choose` returns for the score; the same on all ranks that have a copy of the model."""
        if self._ranks is None:
            return choose(self.score)
        return decided(_EVENT, self._ranks, self.score, choose, lambda: {"step": self._step, **by_hash(self._masks)})

    def _swapped(self, growth: Mapping[str, Tensor], share: float, score: Score) -> Masks:
        ranked = ranked_by(score, self.model, self._layers)
        masks = {}
        for name, active in self._masks.items():
            kept = count_kept(active)
            count = min(int(share * kept), active.numel() - kept)
            own = {name: ranked.values[name]}
            (stay,) = keep_largest(own, kept - count, by=ranked.by, among=[active])
            (come,) = keep_largest({name: growth[name].detach()}, count, among=[~active])
            masks[name] = stay | come
        return Masks(self._request.with_directions(masks, ranked, None, in_place_of_others=True))

    def _log(self, masks: Masks, amount: float) -> None:
        changed = masks is not self._masks
        self.amount = amount
        if changed:
            removed = {name: count_kept(self._masks[name] & ~mask) for name, mask in masks.items()}
            regrown = {name: count_kept(mask & ~self._masks[name]) for name, mask in masks.items()}
            self.events.append(Event(self._step, self.amount, removed, regrown))

    def _hold_from_now(self, masks: Masks) -> None:
        self._hold._replace(self._by_parameter(masks))
        self._begin_from(masks)

    def _begin_from(self, masks: Masks) -> None:
        """Set to zero what the masks prune, which are held already."""
        zero_pruned_(self._by_parameter(masks).items())
        self._masks = masks._belonging_to(self._layers, self._ranks)
        self._written = {name: p._version for name, p in self._layers.items()}
        self._seen_step = False

    def _by_parameter(self, masks: Masks) -> dict[nn.Parameter, Tensor]:
        return {parameter: masks[name] for name, parameter in self._layers.items()}

    # ---------------------------------------------------------------------------------------------------- warnings

    def _look_around(self) -> None:
        """Warn of what can be noticed of a model or an optimizer that was exchanged, without a look at the weights."""
        self._warn_of_replaced()
        self._warn_of_another_optimizer()

    def _warn_of_replaced(self) -> None:
        for name, parameter in self._layers.items():
            try:
                same = self.model.get_parameter(name) is parameter
            except AttributeError:
                same = False
            if not same:
                warn(
                    f"the model's {name!r} is another parameter than the one that is pruned: the masks do not speak of "
                    "it. Make a new Pruner after replacing a layer (remove() this one first)"
                )
                return

    def _warn_of_another_optimizer(self) -> None:
        if self not in _PRUNERS:  # removed
            return
        if unowned := not_owned(self._layers, self._optimizers):
            warn(f"the Pruner's optimizer no longer has {some(unowned)}: the steps of another are not seen")
        counted = set(map(id, parameters_of(self._optimizers[-1])))  # another's steps between are none of its own
        writes = max((p._version - self._written[n] for n, p in self._layers.items() if id(p) in counted), default=0)
        if writes > (WRITES_BETWEEN_STEPS if self._seen_step else WRITES_BEFORE_STEPS):
            warn(
                f"weights were written {writes} times without a step of the optimizer that the Pruner was given, of "
                f"which it has seen {self._step}: give it the one whose step() is called. For a new optimizer, remove "
                "this Pruner, by remove(), make another and load the state of this one into it"
            )


_PRUNERS: weakref.WeakSet[Pruner] = weakref.WeakSet()


def _amounts_of(schedule: Schedule, first: float) -> list[float]:
    """What can be known of a schedule beforehand: how it begins and where it ends."""
    values = values_of(schedule)
    return [first] if values is None else [*itertools.islice(values, 3), schedule(sys.maxsize)]


def _checked_schedule(schedule: Any) -> Schedule:
    if isinstance(schedule, nn.Module):
        raise TypeError(f"schedule must be a function of the step, got a model, {type(schedule).__name__}")
    hint = "a schedule such as gp.Cubic(...), or any function of the step"
    if isinstance(schedule, int | float):
        hint = f"for a sparsity of {schedule} at once give gp.OneShot({schedule})"
    return function("schedule", schedule, hint=hint)


def _require_owned(layers: Mapping[str, nn.Parameter], optimizers: list[Any]) -> None:
    unowned = not_owned(layers, optimizers)
    require(
        len(unowned) < len(layers),
        f"the optimizer owns none of {list(layers)}; was it made from another model or copy?",
    )
    require(
        not unowned,
        f"the optimizer does not have {unowned}: what another optimizer moves would come back. Give all of the model's "
        "optimizers as a list, or exclude these parameters",
    )


def _require_no_other_pruner(layers: Mapping[str, nn.Parameter]) -> None:
    taken = {id(p) for pruner in _PRUNERS for p in pruner._layers.values()}
    both = [name for name, p in layers.items() if id(p) in taken]
    require(not both, f"{both} have a pruner already: call its remove() before you make another")


def _told(state_dict: Mapping[str, Any]) -> dict[str, object]:
    return {"step": state_dict["step"], **by_hash(Masks.from_state_dict(state_dict["masks"]))}


def _event(entry: Any) -> Event:
    wanted: dict[str, Any] = {"step": int, "amount": (int, float), "removed": Mapping, "regrown": Mapping}
    state(entry, wanted, "an event of a Pruner")
    return Event(**{name: entry[name] for name in Event._fields})
