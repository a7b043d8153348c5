"""What becomes of the gradient entries that are not sent? They wait, and are added to the next ones (chapter 3)."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from gradprune.core import checks
from gradprune.core.agree import agree
from gradprune.core.masked import zero_pruned_
from gradprune.core.sharded import like, local
from gradprune.core.words import in_our_words
from gradprune.gradients.nonfinite import NonFinite, known, warn_of_zeroed
from gradprune.gradients.params import Params, by_name
from gradprune.gradients.sparsify import (
    KEEPS,
    Gradients,
    Scope,
    checked_scope,
    not_finite,
    one_of,
    require_finite,
    require_numbers,
)
from gradprune.gradients.spread import over_ranks
from gradprune.gradients.sums import Sums, SumsOverRanks

Amount = float | Callable[[int], float]

_KINDS = ("residuals", "velocities")


class ErrorFeedback:
    """Send the large entries of the gradients, and let what is left out wait and be added to the next ones.

    Between ``backward()`` and the optimizer's step, ``step()`` adds to each gradient what waits for it, keeps the
    largest entries of the sum in ``.grad``, and lets the others wait, what rounding to half precision takes off them
    too. Nothing is lost: what was sent and what waits add up to the sum of all gradients. Call it once for each
    optimizer step: with accumulation, on the accumulated gradient; with a gradient scaler, after
    ``scaler.unscale_(optimizer)`` and with ``nonfinite="leave"``; beside a ``Pruner``, after
    ``pruner.masks.mask_gradients_(model)``, or entries of pruned weights are sent, which nothing uses.

    It keeps one residual for each parameter that has had a gradient, two with momentum, in float32 for half precision;
    a step takes twice that for its duration. It holds no parameter alive, and drops the residual with the parameter. A
    parameter without a gradient takes no part in a step: what waits for it goes on waiting. A deep copy made together
    with the model goes on with the copy of the model.

    Args:
        params: a tensor, an iterable of tensors or of (name, tensor) pairs, or a model. Where parameters are DTensors
            (FSDP2, hybrid sharding, tensor parallel), all ranks step together as one process would, and what waits is
            spread as the parameters are, for torch.distributed.checkpoint too.
        density: the fraction of the entries to send, as for :func:`keep_top_gradients_`: 0.01 is one per cent. Exactly
            one of this, `threshold` and `ratio` is given, each a number or a function of the number of steps taken. The
            schedules of this package give the fraction to leave out: ``density=lambda t: 1 - schedule(t)``.
        threshold: as for :func:`threshold_gradients_`, of the sum.
        ratio: as for :func:`threshold_gradients_`, of the sum.
        scope: as for :func:`keep_top_gradients_`.
        momentum: m in [0, 1). Above 0 it is what waits that has momentum, u = m u + g for each entry, and where an
            entry is sent, its u starts again from zero; the optimizer should have none then.
        nonfinite: what becomes of a step with a gradient that has a NaN or infinite entry. "raise" changes nothing and
            raises; "leave" changes nothing, neither gradients nor what waits, for a gradient scaler that skips the
            step; "skip" sets all gradients to zero and leaves what waits; "zero" takes that gradient as zero and goes
            on. The last two warn.

    Raises:
        TypeError: for arguments of another kind.
        ValueError: before anything is changed, for numbers out of range, an unknown scope, no parameters, and not
            exactly one rule.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> feedback = gp.ErrorFeedback(weight, density=0.5)
        >>> for _ in range(3):
        ...     weight.grad = torch.tensor([1.0, 0.6])
        ...     print(feedback.step(), weight.grad)
        0.5 tensor([1., 0.])
        0.5 tensor([0.0000, 1.2000])
        0.5 tensor([2., 0.])

    Seide et al. (2014) and Strom (2015) for the residual, Karimireddy et al. (2019) for why it helps, Lin et al.
    (2018), section 3, for momentum, clipping and warm-up; chapter 3, equations 3.5, 3.6 and 3.15.
    """

    @in_our_words
    def __init__(
        self,
        params: Params,
        density: Amount | None = None,
        *,
        threshold: Amount | None = None,
        ratio: Amount | None = None,
        scope: Scope = "global",
        momentum: float = 0.0,
        nonfinite: NonFinite = "raise",
    ) -> None:
        self._rule, given = one_of(density=density, threshold=threshold, ratio=ratio)
        if isinstance(given, type | nn.Module):
            kind = f"the class {given.__name__}" if isinstance(given, type) else f"a model, {type(given).__name__}"
            raise TypeError(f"{self._rule} must be a number or a function of the step, got {kind}")
        self._given = given if callable(given) else _amount(self._rule, self._rule, given)
        self._scope = checked_scope(scope)
        self._momentum = checks.number("momentum", momentum, least=0.0, below=1.0)
        self._nonfinite = known(nonfinite)
        self._steps = 0
        self._entries: dict[str, _Entry] = {}
        named = by_name(params)
        if not named:
            raise ValueError("params is empty; an iterator that was used up before cannot be used again")
        for name, parameter in named.items():
            self._entries[name] = _Entry(_reference(parameter, name, self._entries), {})

    @torch.no_grad()
    def step(self) -> float:
        """Replace the gradients by what is sent now, in place.

        Whatever interrupts it, gradients and what waits are both as before the step or both as after it.

        Returns:
            The share of the entries that is sent, between 0 and 1: 1.0 where no parameter has a gradient, 0.0 where a
            gradient is not finite under "leave" or "skip".

        Raises:
            TypeError, ValueError: before any gradient or residual is changed, where no parameter lives any more, where
                a gradient is sparse, complex, cannot be written, is of another shape than what waits for it or is not
                finite under "raise", where the sum leaves the range of the gradient's dtype, and where a schedule's
                number is out of range.
        """
        living = self._living()
        if not living:
            raise ValueError("no parameter lives any more: keep the model, and copy this together with it")
        kind = SumsOverRanks if over_ranks(list(living.values())) else Sums
        step = kind(living, self._asked, self._require_fits)
        gradients, amount = step.gradients, step.asked["amount"]
        wrong = step.not_finite()
        require_finite(wrong, self._nonfinite)
        if wrong and self._nonfinite == "leave":
            return 0.0
        if wrong:
            warn_of_zeroed(wrong[0], self._nonfinite, "Find out where it comes from")
            if self._nonfinite == "skip":
                for gradient in gradients.values():
                    gradient.zero_()
                return 0.0
        found = {name: torch.zeros_like(g) if name in wrong else g for name, g in gradients.items()}
        waiting = {name: self._waiting_with(name, gradient) for name, gradient in found.items()}
        sums = {name: kept["residuals"] for name, kept in waiting.items()}
        for name in step.beyond(sums):
            raise ValueError(
                f"the gradient of {name!r} plus what waits for it leaves the range of {gradients[name].dtype}"
            )
        if self._rule == "density":
            masks = step.largest(sums, amount, self._scope)
        else:
            masks = step.at_least(sums, amount, of_mean=self._rule == "ratio")
        zero_pruned_((kept["velocities"], ~masks[name]) for name, kept in waiting.items() if "velocities" in kept)
        sent = {name: sums[name].to(gradient.dtype, copy=True) for name, gradient in gradients.items()}
        zero_pruned_((sent[name], mask) for name, mask in masks.items())
        for name, values in sent.items():
            sums[name].sub_(values)  # exact: the entry is either the sum, rounded to the gradient's dtype, or zero
        share = step.share(masks)
        self._commit(gradients, sent, waiting)
        return share

    def _commit(self, gradients: Gradients, sent: Gradients, waiting: Mapping[str, dict[str, Tensor]]) -> None:
        """Write the gradients and what waits, or, where something interrupts, neither."""
        before = {name: self._entries[name] for name in waiting}
        after = {name: entry._replace(waiting=entry.waiting | waiting[name]) for name, entry in before.items()}
        steps, originals = self._steps, {}
        try:
            for name, gradient in gradients.items():
                originals[name] = gradient.clone()
                gradient.copy_(sent.pop(name))
            self._entries.update(after)
            self._steps = steps + 1
        except BaseException:
            self._steps = steps
            self._entries.update(before)
            for name, original in originals.items():
                gradients[name].copy_(original)
            raise

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return self._steps

    @property
    def residuals(self) -> Mapping[str, Tensor]:
        """What waits for each parameter that has had a gradient, by name; to look at, not to change."""
        return MappingProxyType(self._all("residuals"))

    def state_dict(self) -> dict[str, Any]:
        """Steps, residuals and, with momentum, velocities: what ``load_state_dict`` needs to go on from here."""
        return {"steps": self._steps, "residuals": self._all("residuals"), "velocities": self._all("velocities")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state` was taken, bit for bit.

        Args:
            state: what ``state_dict()`` returned.

        Raises:
            TypeError, ValueError: before anything is changed, where it is not a state of this class, names a parameter
                that is not here, where a shape differs or a value is not finite, and where it has velocities and this
                has no momentum, or the reverse.
        """
        state = checks.state(state, {"steps": int, "residuals": Mapping, "velocities": Mapping}, "ErrorFeedback")
        living = self._living()

        def checked() -> tuple[int, dict[str, _Entry]]:
            return checks.whole("steps", state["steps"], least=0), self._loaded(state, living)

        if over_ranks(list(living.values())):
            (steps, found), _ = agree("load_state_dict", lambda: (checked(), {"steps": state["steps"]}, None))
        else:
            steps, found = checked()
        self._entries.update(found)
        self._steps = steps

    def _loaded(self, state: Mapping[str, Any], living: Mapping[str, Tensor]) -> dict[str, _Entry]:
        """The entries with what a state says that waits; as ``load_state_dict`` raises."""
        for kind in _KINDS:
            for name, tensor in state[kind].items():
                if name not in living:
                    raise ValueError(f"the state has {kind} of {name!r}, which is not among the parameters here")
                called = f"the state's {kind} of {name!r}"
                here = _block(called, tensor, living[name])
                _require_residual(called, here)
                _require_shape(called, tensor, living[name])
                _require_shape(called, here, local(living[name]))
            wrong = not_finite({name: local(tensor) for name, tensor in state[kind].items()})
            if wrong:
                raise ValueError(f"the state's {kind} of {wrong[0]!r} are not finite")
        if state["residuals"] and bool(state["velocities"]) != bool(self._momentum):
            has = "has velocities" if state["velocities"] else "has no velocities"
            raise ValueError(f"the state {has}, and momentum here is {self._momentum}")
        return {
            name: entry._replace(
                waiting={kind: local(state[kind][name]).detach().clone() for kind in _KINDS if name in state[kind]}
            )
            for name, entry in self._entries.items()
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> ErrorFeedback:
        made = copy.copy(self)
        memo[id(self)] = made
        made._given = copy.deepcopy(self._given, memo)
        made._entries = {}
        for name, parameter in self._living().items():
            waiting = {kind: tensor.clone() for kind, tensor in self._entries[name].waiting.items()}
            reference = _reference(copy.deepcopy(parameter, memo), name, made._entries)
            made._entries[name] = _Entry(reference, waiting)
        return made

    def __copy__(self) -> ErrorFeedback:
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __reduce__(self) -> NoReturn:
        raise TypeError("ErrorFeedback cannot be pickled, as it does not own its parameters: save its state_dict()")

    def _living(self) -> dict[str, Tensor]:
        referents = {name: entry.parameter() for name, entry in self._entries.items()}
        return {name: parameter for name, parameter in referents.items() if parameter is not None}

    def _all(self, kind: str) -> dict[str, Tensor]:
        living = self._living()
        return {n: like(p, w[kind]) for n, p in living.items() if kind in (w := self._entries[n].waiting)}

    def _waiting_with(self, name: str, gradient: Tensor) -> dict[str, Tensor]:
        """What would wait for this parameter if nothing was sent, in new tensors."""
        before = self._entries[name].waiting
        wide = torch.promote_types(gradient.dtype, torch.float32)
        found, last = {}, gradient.to(wide)
        if self._momentum:
            if "velocities" in before:
                last = last + self._momentum * before["velocities"].to(gradient.device)
            found["velocities"] = last.clone() if last is gradient else last
        residual = before.get("residuals")
        found["residuals"] = last.clone() if residual is None else residual.to(gradient.device) + last
        return found

    def _asked(self) -> dict[str, Any]:
        """What this step asks, which all ranks must ask alike."""
        amount = self._given
        if callable(amount):
            amount = _amount(f"{self._rule} at step {self._steps}", self._rule, amount(self._steps))
        same = {"scope": self._scope, "momentum": self._momentum, "nonfinite": self._nonfinite, "steps": self._steps}
        return {"amount": amount, "rule": self._rule, **same}

    def _require_fits(self, gradients: Mapping[str, Tensor]) -> None:
        require_numbers(gradients)
        for name, gradient in gradients.items():
            for kind, tensor in self._entries[name].waiting.items():
                _require_shape(f"the {kind} of {name!r}", tensor, gradient)


class _Entry(NamedTuple):
    parameter: weakref.ref[Tensor]
    waiting: dict[str, Tensor]


def _reference(parameter: Tensor, name: str, entries: dict[str, _Entry]) -> weakref.ref[Tensor]:
    """A weak reference that takes the parameter's entry with it."""
    return weakref.ref(parameter, lambda _: entries.pop(name, None))


def _amount(called: str, rule: str, value: Any) -> float:
    return checks.fraction(called, value, one=KEEPS) if rule == "density" else checks.number(called, value, least=0.0)


def _block(called: str, tensor: Any, parameter: Tensor) -> Any:
    """What is held here of a tensor that must be spread over the ranks as its parameter is."""
    if not isinstance(tensor, Tensor):
        return tensor
    lies = [getattr(t, "placements", None) for t in (tensor, parameter)]
    if lies[0] != lies[1]:
        raise ValueError(f"{called} lie as {lies[0] or 'plain tensors'}, the parameter as {lies[1] or 'a plain one'}")
    return local(tensor)


def _require_shape(called: str, tensor: Tensor, wanted: Tensor) -> None:
    if tensor.shape != wanted.shape:
        raise ValueError(f"{called} have shape {tuple(tensor.shape)}, the parameter has shape {tuple(wanted.shape)}")


def _require_residual(called: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.float32, torch.float64):
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{called} must be a tensor of float32 or float64, got {kind}")
    checks.require_writable(called, tensor, "tensor")
