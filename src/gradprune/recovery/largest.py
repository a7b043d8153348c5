"""How far can a network be pruned until it falls below what is wanted (chapter 6)?

Bisection: of an interval whose lower end passes and whose upper end does not, the middle is looked at, until the
interval is short enough. All masks come from one ranking of the dense network's weights.

With noise, a look passes where a lower bound does. Let the true curve fall. A look is wrong if it passes beyond the
true crossing; until the first wrong look all looks follow the one path that exact answers would take, or one that ends
before the crossing, where no look can be wrong in this way. So the looks that matter are known beforehand, at most as
many as bisection takes, and if each is wrong with a probability of at most (1 - confidence) / looks, all together are
so with at most 1 - confidence (Bonferroni).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor, nn

from gradprune.core.checks import function, module, require, warn, whole
from gradprune.core.masked import count_alive, zero_pruned_
from gradprune.core.progress import bar, state
from gradprune.core.words import in_our_words
from gradprune.recovery.found import Found, Look
from gradprune.recovery.history import Round
from gradprune.recovery.looked import Looked
from gradprune.recovery.original import Original
from gradprune.recovery.outcome import Measure, Outcome, measured
from gradprune.recovery.told import digest, score_of
from gradprune.recovery.wish import Correction, Ends, Train, Wish, correction_of, ends_of, wish_of
from gradprune.weights.eligible import Patterns, StatedAxes
from gradprune.weights.granularity import Granularity, Ranked
from gradprune.weights.mask import Masks
from gradprune.weights.plan import Scope
from gradprune.weights.request import Request, Score, checked_score, ranked_by
from gradprune.weights.score import magnitude

MOST_LOOKS = 20  # evaluations, where each look takes one
PROBES = 4


@in_our_words
def largest_sparsity(
    model: nn.Module,
    evaluate: Measure,
    *,
    at_least: float | None = None,
    margin: float | None = None,
    confidence: float | None = None,
    repeats: int = 1,
    tolerance: float = 0.001,
    lowest: float = 0.0,
    highest: float = 1.0,
    probes: int | None = None,
    train: Train | None = None,
    steps: int | None = None,
    score: Score = magnitude,
    scope: Scope = "global",
    granularity: Granularity = "weight",
    include: Patterns = None,
    exclude: Patterns = None,
    min_keep: int | None = None,
    axes: StatedAxes = None,
    file: str | os.PathLike[str] | None = None,
) -> Found:
    """Return the largest sparsity at which `evaluate` still gives what is wanted, found by bisection.

    The score is asked once, of the dense network; its masks at growing sparsities lie within each other (with ``"erk"``
    but for rounding). The model is left bit by bit as it was, whatever is raised meanwhile: a copy of its
    parameters is kept until then.

    Args:
        model: the network; it is pruned, and with `train` trained, while the call runs.
        evaluate: a function from the model to a number, or to a tensor with one result an example (the same examples
            each time, in one order); the higher, the better. Use data that neither trained it nor will judge it. It
            may not change the weights, as for ``sensitivity``.
        at_least: what `evaluate` must reach in the mean.
        margin: how much less than the dense network it may give; give either this or `at_least`. With a confidence the
            two are compared example by example, which is by far the sharper comparison.
        confidence: such as 0.95: a look passes only where it is shown to, and the answer is "at least this sparsity"
            with this confidence, all looks taken together, where the true curve falls. The unit is the example (bounds
            by Wilson and Tango for two values, such as zeros and ones, else by Student's t), or where `evaluate` gives
            one number the repetition, which must then vary. None takes what `evaluate` gives as exact.
        repeats: how often each look, and the dense network, is evaluated.
        tolerance: the length of the interval at which bisection ends; a sparsity more than this above the answer did
            not pass.
        lowest: a sparsity that must pass; 0 is the dense network.
        highest: a sparsity above all that are looked at.
        probes: looks, at the middles of the widest gaps, that only find out whether the curve falls; 4 unless given,
            none with `train`.
        train: ``train(model, round)`` as for ``iterate``, run from the dense weights after each pruning; it calls
            ``round.hold(optimizer)`` and takes ``round.steps``. How many runs there are at most is said first, on
            standard error.
        steps: with `train`, the steps of each run.
        score: as for ``prune``.
        scope: as for ``prune``, but not by name.
        granularity: as for ``prune``, but not n of m.
        include: as for ``prune``.
        exclude: as for ``prune``.
        min_keep: as for ``prune``.
        axes: as for ``prune``.
        file: where each look is written down, whole or not at all, with `train` the best corrected network too. The
            same call, told by as much as with ``sensitivity``, goes on from it; torch's random state is the process's
            own.

    Returns:
        A ``Found``.

    Raises:
        TypeError: where an argument is of a wrong kind.
        ValueError: where one is out of range, before anything is evaluated; where `lowest` does not pass, or there are
            too few examples to show that it does; where `evaluate` returns anything but finite numbers, or changes
            the weights; where the file is damaged, of another call or cannot be written.
        RuntimeError: where `train` left a pruned weight other than zero.

    Warns where the curve rises again: a higher sparsity passes than one that does not; and where every look passes, as
    where `evaluate` returns a loss.

    Example:
        >>> model = nn.Linear(10, 10)
        >>> found = gp.largest_sparsity(model, lambda model: (model.weight != 0).sum() / 100, at_least=0.25)
        >>> round(found.sparsity, 3), found.evaluations
        (0.75, 12)

    Non-inferiority on pairs: Tango (1998); chapter 6.
    """
    module(model)
    function("evaluate", evaluate)
    wish = wish_of(at_least, margin, confidence, repeats)
    ends = ends_of(tolerance, lowest, highest)
    as_prune = {"include": include, "exclude": exclude, "min_keep": min_keep, "axes": axes}
    request = _request(model, scope, granularity, as_prune)
    score = checked_score(score)
    correction = correction_of(model, train, steps)
    spare = (PROBES if train is None else 0) if probes is None else whole("probes", probes, least=0, most=MOST_LOOKS)
    total = 1 + ends.gate + ends.looks + spare
    require(
        total <= MOST_LOOKS,
        f"tolerance={tolerance} and probes={spare} take {total} looks, more than {MOST_LOOKS}: a tolerance of "
        f"{(ends.highest - ends.lowest) / 2 ** (MOST_LOOKS - 1 - ends.gate - spare):.2g} is the least",
    )
    if correction is not None:
        runs = total - 1
        state(
            f"largest_sparsity: at most {runs} runs of train, {runs * len(correction.steps):,} steps, and "
            f"{total * wish.repeats} evaluations"
        )
    call = (
        {}
        if file is None
        else {
            "layers": list(request.layers),
            "weights": digest(model),
            "wish": vars(wish),
            "ends": vars(ends),
            "score": score_of(score),
            "scope": str(scope),
            "granularity": str(granularity),
            "min_keep": min_keep,
            "steps": None if correction is None else len(correction.steps),
        }
    )
    looked = Looked(file, model, call, trains=correction is not None)
    ranked = ranked_by(score, model, request.parameters)
    search = _Search(model, evaluate, request, ranked, wish, ends, correction, looked)
    with bar(total, "largest sparsity", (looked.dense is not None) + len(looked.looks)) as progress:
        return search.run(spare, progress.update)


def _request(model: nn.Module, scope: Any, granularity: Any, as_prune: Mapping[str, Any]) -> Request:
    require(not isinstance(scope, Mapping), "scope gives sparsities by name, and which one is to be found")
    request = Request.of(model, scope=scope, granularity=granularity, **as_prune)
    require(request.n_of_m is None, f"granularity={granularity!r} is itself a sparsity: there is nothing to find")
    request.plan(sparsity=0.5)
    return request


class _Search:
    """The bisection: what has been looked at, and the best that passed."""

    def __init__(
        self,
        model: nn.Module,
        evaluate: Measure,
        request: Request,
        ranked: Ranked,
        wish: Wish,
        ends: Ends,
        correction: Correction | None,
        looked: Looked,
    ) -> None:
        self._model, self._evaluate, self._request = model, evaluate, request
        self._wish, self._ends, self._correction = wish, ends, correction
        self._values = {name: value.detach().clone() for name, value in ranked.values.items()}
        self._by = ranked.by
        self._original = Original(model)
        self._looked = looked
        self._curve: list[tuple[float, Look]] = []  # with the sparsity that was asked for

    def run(self, probes: int, update: Callable[[], Any]) -> Found:
        """Look at the dense network, then between the ends; say whether the curve falls."""
        with self._original.kept():
            return self._run(probes, update)

    def _run(self, probes: int, update: Callable[[], Any]) -> Found:
        if self._looked.dense is None:
            self._looked.dense = self._measured("for the dense network")
            self._looked.write()
            update()
        self._dense = self._looked.dense
        low, high = self._ends.lowest, self._ends.highest
        self._check_lowest(update)
        for _ in range(self._ends.looks):
            middle = (low + high) / 2
            low, high = (middle, high) if self._look(middle, update, probe=False).passed else (low, middle)
        for _ in range(probes):
            self._look(self._widest_gap(), update, probe=True)
        return self._found(low)

    def _measured(self, where: str, written: Iterable[nn.Parameter] = ()) -> Outcome:
        """One result an example, averaged over the repetitions; where `evaluate` gives one number, one a repetition."""
        repeats = range(self._wish.repeats)
        runs = [measured(self._evaluate, self._model, where, self._original, written) for _ in repeats]
        self._looked.evaluations += len(runs)
        sizes = [run.each.size for run in runs]
        sizes = sizes if self._looked.size is None else [self._looked.size, *sizes]
        require(
            min(sizes) == max(sizes),
            f"evaluate returned {max(sizes)} results once and {min(sizes)} another time ({where}): they must be of the "
            "same examples",
        )
        self._looked.size = sizes[0]
        each = np.stack([run.each for run in runs])
        found = each.mean(axis=0) if sizes[0] > 1 else each[:, 0]
        require(
            self._wish.confidence is None or found.size > 1,
            "a statement with a confidence needs results example by example, a tensor from evaluate, or repeats of at "
            f"least 2; evaluate returned one number and repeats={self._wish.repeats}",
        )
        dense = self._looked.dense is None
        require(
            self._wish.confidence is None or sizes[0] > 1 or not dense or bool((found != found[0]).any()),
            f"evaluate does not vary: {found.size} repetitions gave {found[0]:g} {where}, so that they say nothing of "
            "how far to trust it. For a confidence give one result an example, a tensor; else repeats=1 and none",
        )
        return Outcome(float(found.mean()), found)

    def _bound(self, outcome: Outcome) -> float | None:
        looks = self._ends.looks + 1
        return self._wish.bound(outcome, self._dense, looks, by_example=(self._looked.size or 0) > 1)

    def _look(self, sparsity: float, update: Callable[[], Any], *, probe: bool) -> Look:
        """Prune to a sparsity, correct, evaluate, and put all back; or read what the file knows of it."""
        if sparsity in self._looked.looks:
            look = self._looked.looks[sparsity]
            self._curve.append((sparsity, look))
            return look
        masks = self._masks(sparsity)
        same = [look for _, look in self._curve if look.sparsity == masks.sparsity]
        if same:  # between two whole numbers of weights there is nothing to look at
            self._curve.append((sparsity, replace(same[0], probe=probe)))
            update()
            return same[0]
        parameters = self._request.parameters
        written = list(parameters.values()) if self._correction is None else list(self._model.parameters())
        with self._original.keeper.unchanged(written):
            zero_pruned_([(parameters[name], mask) for name, mask in masks.items()])
            if self._correction is not None:
                self._correct(masks, sparsity)
            outcome = self._measured(f"at sparsity {sparsity:.4g}", written)
            bound = self._bound(outcome)
            reached = self._wish.gained(outcome.mean, self._dense.mean) if bound is None else bound
            look = Look(masks.sparsity, outcome.mean, bound, reached >= self._wish.wanted, probe)
            if look.passed and not probe and self._correction is not None:
                self._looked.state = {n: _copy(v) for n, v in self._model.state_dict().items()}
        self._curve.append((sparsity, look))
        self._looked.looks[sparsity] = look
        self._looked.write()
        update()
        return look

    def _masks(self, sparsity: float) -> Masks:
        """The masks at a sparsity on the way, of which nobody need be warned."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Masks(self._request.keep(Ranked(self._values, self._by), sparsity))

    def _correct(self, masks: Masks, sparsity: float) -> None:
        assert self._correction is not None
        round_ = Round(len(self._curve) + 1, self._correction.steps, masks, None)
        self._correction.train(self._model, _applied(round_, self._model))
        for name, mask in masks.items():
            revived = count_alive([(self._request.parameters[name], mask)])
            if revived:
                raise RuntimeError(
                    f"train left {revived} pruned weights of {name!r} other than zero at sparsity {sparsity:.4g}: call "
                    "round.hold(optimizer) before the first step"
                )

    def _check_lowest(self, update: Callable[[], Any]) -> None:
        """Raise ValueError where nothing can pass."""
        if self._ends.lowest > 0:
            look = self._look(self._ends.lowest, update, probe=False)
            name, reached, value = f"sparsity {self._ends.lowest:g}", look.bound, look.value
        else:
            name, value = "the dense network", self._dense.mean
            reached = self._bound(self._dense)
        gained = self._wish.gained(value, self._dense.mean)
        wanted = f"at_least={self._wish.at_least}" if self._wish.margin is None else f"margin={self._wish.margin}"
        require(gained >= self._wish.wanted, f"{name} gives {value:.6g}, and {wanted} is not met there: nothing can be")
        require(
            reached is None or reached >= self._wish.wanted,
            f"{wanted} cannot be shown even for {name}, by {self._dense.each.size} results: with a confidence of "
            f"{self._wish.confidence} over {self._ends.looks + 1} looks the bound is {reached or 0.0:.4g}. Give more "
            "examples or repeats, a larger tolerance (fewer looks), or want less",
        )

    def _widest_gap(self) -> float:
        """The middle of the widest gap between what was looked at."""
        seen = sorted({self._ends.lowest, self._ends.highest, *(asked for asked, _ in self._curve)})
        _, middle = max((b - a, (a + b) / 2) for a, b in pairwise(seen))
        return middle

    def _found(self, low: float) -> Found:
        looks = sorted({look.sparsity: look for _, look in reversed(self._curve)}.values(), key=lambda k: k.sparsity)
        failed = [look for look in looks if not self._reaches(look)]
        above = [look for look in looks if failed and look.passed and look.sparsity > failed[0].sparsity]
        masks = Masks(self._request.keep(Ranked(self._values, self._by), low))
        if above:
            warn(
                f"the curve rises again: sparsity {above[-1].sparsity:.4g} passes with {above[-1].value:.4g}, and "
                f"{failed[0].sparsity:.4g} does not with {failed[0].value:.4g}: the answer is one crossing of several"
            )
        if looks and all(look.passed for look in looks):
            warn(
                f"every look passes, up to sparsity {looks[-1].sparsity:.4g} with {looks[-1].value:.6g}: the answer is "
                "the highest that was looked at. If evaluate returns a loss or an error, give its negative; if it "
                "returns per cent, so must at_least and margin be"
            )
        return Found(
            masks.sparsity,
            masks,
            tuple(looks),
            self._looked.evaluations,
            self._dense.mean,
            self._wish.wanted,
            self._wish.confidence,
            not above,
            self._looked.state,
        )

    def _reaches(self, look: Look) -> bool:
        """Whether the value itself does, shown or not."""
        return self._wish.gained(look.value, self._dense.mean) >= self._wish.wanted


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _applied(work: Round, model: nn.Module) -> Round:
    """The round, with masks that know the model's parameters, so that ``round.hold`` does."""
    work.masks.apply_(model)
    return work
