"""Prune while a network trains, by a schedule, and let pruned weights come back (chapter 5)."""

from __future__ import annotations

import copy
import itertools
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn, Unpack

from torch import Tensor, nn

from gradprune.core.checks import choice, fraction, function, module, number, require, state, warn, whole
from gradprune.core.masked import zero_pruned_
from gradprune.core.sharded import local
from gradprune.core.steps import Optimizers, Steps, as_list, not_owned, parameters_of
from gradprune.weights import event
from gradprune.weights.deciding import Now, deciding_of
from gradprune.weights.event import Event
from gradprune.weights.hold import Hold, warn_of_revived
from gradprune.weights.mask import Masks
from gradprune.weights.named import some
from gradprune.weights.prune import AsPrune, check_for_schedule
from gradprune.weights.regrow import Regrow, checked_regrow
from gradprune.weights.request import Request, Score, checked_score
from gradprune.weights.schedule import values_of
from gradprune.weights.score import magnitude
from gradprune.weights.shown import by_layer, in_all

Schedule = Callable[[int], float]
WRITES_BEFORE_STEPS = 2  # that are no sign of another optimizer: initialising, loading
WRITES_BETWEEN_STEPS = 10  # likewise: an average put in and taken out again


class Pruner:
    """Prune `model` while `optimizer` trains it, by a schedule; it rides on the optimizer's own steps.

    Where the schedule's value changes, weights are pruned by ``prune`` and held at zero from then on. What is pruned
    already, held by an optimizer or zero in a layer that is not zero as a whole, stays pruned. A step that an AMP
    scaler skips is no step. Before the climb of a step in two halves (SAM), ``masks.mask_gradients_(model)`` keeps
    pruned weights out of it. Save ``state_dict()`` beside the model's and the optimizer's own: a run resumed from them
    goes on bit for bit. The masks are those of the parameters that were eligible when it was made, also where a layer
    is frozen later. Where DistributedDataParallel wraps the model, or its parameters are DTensors (FSDP2, tensor
    parallel), all ranks make it alike and decide each event together, as ``prune`` does. ``copy.deepcopy`` of model,
    optimizer and pruner together gives a pruner of the copies.

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
        example: as for ``prune``, for granularity ``"group"``: the network is traced once. With a channel its bias and
            its norm's scale and shift are held at zero, so that ``shrink(model, example, pruner.masks)`` takes it out.
            Channels do not come back by `regrow`.
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
        example: Any = None,
        **as_prune: Unpack[AsPrune],
    ) -> None:
        self._deciding = deciding_of(model)

        def checked() -> float:
            self.model, self._optimizers = module(model), as_list(optimizer)
            self.schedule = _checked_schedule(schedule)
            if values_of(score) is not None:  # type: ignore[arg-type]
                raise TypeError("score is a schedule: the order is Pruner(model, optimizer, schedule, score)")
            self.score = checked_score(score)
            self.regrow = checked_regrow(regrow, as_prune.get("granularity", "weight"))
            choice("amount", amount, ("sparsity", "threshold"))
            self._kind = amount
            check_for_schedule("Pruner", as_prune, own=("score", "regrow", "within", "example"))
            self._request = self._deciding.request(self.model, example, **as_prune)
            self._layers = self._request.parameters
            first = self._wanted(0)
            self._request.check_amounts(_amounts_of(schedule, first), self._kind)
            _require_owned(self._request, self._optimizers)
            _require_no_other_pruner(self._layers)
            self._masks = self._deciding.before(self._request, within)
            return first

        def asked() -> dict[str, object]:
            swaps = None if regrow is None else (regrow.every, regrow.share(regrow.every))
            return {
                "schedule": _amounts_of(schedule, self._wanted(0)),
                "regrow": swaps,
                **as_prune,
                **self._masks._told(),
            }

        first = self._deciding.alike("gp.Pruner", asked, checked)
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
        kept = self._masks._counts()
        return f"Pruner(step {self._step}, {events}, {in_all(self._masks, kept)}){by_layer(self._masks, kept)}"

    def remove(self) -> None:
        """Stop pruning and holding; masks, events and weights stay as they are."""
        self._steps.remove()
        self._hold.remove()
        _PRUNERS.discard(self)

    def state_dict(self) -> dict[str, Any]:
        """Step, amount, events (as JSON) and bit-packed masks: what ``load_state_dict`` needs to go on from here.

        Of parameters that are DTensors the masks are DTensors too, copies, which torch.distributed.checkpoint saves and
        loads on any number of ranks: load into the ``state_dict()`` of a new pruner, and that by ``load_state_dict``.
        """
        self._look_around()
        warn_of_revived(self._layers)
        return {
            "step": self._step,
            "amount": self.amount,
            "masks": self._masks.state_dict(),
            "events": event.written(self.events),
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
            state(state_dict, {"step": int, "amount": (int, float), "masks": Mapping, "events": (str, list)}, "Pruner")
            step = whole("the state's step", state_dict["step"], least=0)
            amount = number("the state's amount", state_dict["amount"], finite=False)
            events = event.read(state_dict["events"])
            masks = self._deciding.restored(state_dict["masks"], self._layers)
            if {n: m.shape for n, m in masks.items()} != {n: m.shape for n, m in self._masks.items()}:
                raise ValueError(f"the state has masks for {list(masks)}, this pruner prunes {list(self._masks)}")
            told.update(step=step, **masks._told())
            self._require_not_beyond(step, amount)
            return step, amount, events, masks

        told: dict[str, object] = {}
        step, amount, events, masks = self._deciding.alike("load_state_dict", lambda: told, checked)
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
        twin._request = self._request.copied(memo)
        twin._layers = twin._request.parameters
        twin.events, twin._growth = list(self.events), None
        twin._masks = copy.deepcopy(self._masks)
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
            self._growth = self._deciding.growth(self.regrow.by, self.model, self._layers)

    def _after_step(self) -> None:
        self._step += 1
        wanted = self._wanted(self._step)
        if wanted != self.amount:
            masks = self._chosen(wanted)
            self._log(masks, wanted)
            self._hold_from_now(masks)
        if self._growth is not None and self.regrow is not None:
            growth, self._growth = self._growth, None
            share = self.regrow.share(self._step)
            masks = self._deciding.swap(self._now(), growth, share)
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
            if self._request.sparsity(before) >= amount:
                return before
        amounts: dict[str, Any] = self._request.amount(amount, self._kind)
        return self._deciding.choose(self._now(), amounts)

    def _now(self) -> Now:
        return Now(self._request, self.model, self.score, self._masks, self._step)

    def _log(self, masks: Masks, amount: float) -> None:
        changed = masks is not self._masks
        self.amount = amount
        if changed:
            self.events.append(Event(self._step, self.amount, *self._deciding.changes(self._masks, masks)))

    def _hold_from_now(self, masks: Masks) -> None:
        self._hold._replace(self._by_parameter(masks))
        self._begin_from(masks)

    def _begin_from(self, masks: Masks) -> None:
        """Set to zero what the masks prune, which are held already."""
        zero_pruned_(self._by_parameter(masks).items())
        self._masks = masks._belonging_to(self._layers, self._deciding.ranks)
        self._written = {name: p._version for name, p in self._layers.items()}
        self._seen_step = False

    def _by_parameter(self, masks: Masks) -> dict[nn.Parameter, Tensor]:
        return {parameter: local(masks[name]) for name, parameter in self._layers.items()}

    # ---------------------------------------------------------------------------------------------------- warnings

    def _look_around(self) -> None:
        """Warn of what can be noticed of a model or an optimizer that was exchanged, without a look at the weights."""
        self._warn_of_replaced()
        self._warn_of_another_optimizer()

    def _warn_of_replaced(self) -> None:
        self._deciding.look_around(self.model)
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
        if unowned := not_owned(self._request.moved, self._optimizers):
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


def _require_owned(request: Request, optimizers: list[Any]) -> None:
    unowned = not_owned(request.moved, optimizers)
    require(
        len(unowned) < len(request.moved),
        f"the optimizer owns none of {list(request.moved)}; was it made from another model or copy?",
    )
    these = "these parameters" if request.layers.keys() & set(unowned) else "the filters that these go with"
    require(
        not unowned,
        f"the optimizer does not have {unowned}: what another optimizer moves would come back. Give all of the model's "
        f"optimizers as a list, or exclude {these}",
    )


def _require_no_other_pruner(layers: Mapping[str, nn.Parameter]) -> None:
    taken = {id(p) for pruner in _PRUNERS for p in pruner._layers.values()}
    both = [name for name, p in layers.items() if id(p) in taken]
    require(not both, f"{both} have a pruner already: call its remove() before you make another")
