"""Chapter 5: at equal sparsity and equal budget, which library and which way keep the most accuracy?

`python chapters/experiments/peers.py` writes chapters/results/peers.json; a run that was stopped goes on where it was.
It needs `pip install torch-pruning`, and fasterai where it can be had; what is missing is left out.

Every method starts from the same dense networks and has the same number of steps to prune and correct
(`protocol.py`). Each is tuned in the same way, by the mean validation accuracy at 95 % of two seeds that are not used
again: first the peak of its learning rate, four shares of the dense one, with its first option; then, at that rate, its
three options, which are choices that the library itself offers (OPTIONS). Then five fresh seeds, read once on test
data. Torch-Pruning removes channels; its sparsity is the share of the multiply-adds that is gone.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import protocol
import torch
from protocol import CORRECTION, SHARES, TUNING_SEEDS, straight_down
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune as torch_prune

import gradprune as gp
from gradprune import lab

SEEDS = list(range(5))
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
TUNED_AT = 0.95
RAMP = 0.6  # the share of the correction in which gradual methods prune
EVERY = 20  # steps between two events of a gradual method
SWAPPED, SWAPPING = 0.3, 0.8 * CORRECTION  # the share of the weights that is swapped first, and the step it falls to 0
ROUNDS = 4
L1 = 3e-4  # the penalty on the size of the weights while they are pruned, in the one method that has one
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)

Correct = Callable[..., None]
Method = Callable[..., nn.Module]
SCOPES: list[dict[str, Any]] = [{"scope": "global"}, {"scope": "lamp"}, {"scope": "erk"}]


def weighted_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the layers whose weights are pruned, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LAYERS)]


def ours_one_shot(
    model: nn.Module, sparsity: float, correct: Correct, *, scope: str, score: Any = gp.magnitude
) -> nn.Module:
    """Prune once; hold while correcting."""
    masks = gp.prune(model, score, sparsity=sparsity, scope=scope)
    correct(model, prepare=masks.hold)
    return model


def ours_gradual(
    model: nn.Module,
    sparsity: float,
    correct: Correct,
    *,
    scope: str,
    distil: bool = False,
    regrow: bool = False,
    l1: float = 0.0,
) -> nn.Module:
    """Prune on the cubic schedule while correcting; with a teacher, weights that come back, or an L1 penalty."""
    teacher = copy.deepcopy(model).eval()
    ramp = gp.Cubic(sparsity, 0, int(RAMP * CORRECTION), every=EVERY)
    weights = [module.weight for _, module in weighted_layers(model)]
    growth = gp.Regrow(by=gp.gradient, fraction=lambda step: SWAPPED * max(0.0, 1 - step / SWAPPING), every=EVERY)
    taken = [0]

    def loss(scores: Tensor, y: Tensor, x: Tensor) -> Tensor:
        value = functional.cross_entropy(scores, y)
        if distil:
            with torch.no_grad():
                wanted = teacher(x)
            value = 0.5 * value + 0.5 * gp.distill_loss(scores, wanted, 2.0)
        taken[0] += 1
        if l1 and taken[0] < ramp.end:
            value = value + l1 * torch.stack([weight.abs().sum() for weight in weights]).sum()
        return value

    def ride(optimizer: torch.optim.Optimizer) -> None:
        gp.Pruner(model, optimizer, ramp, scope=scope, regrow=growth if regrow else None)

    correct(model, prepare=ride, loss=loss if distil or l1 else None)
    return model


def ours_iterative(model: nn.Module, sparsity: float, correct: Correct, *, scope: str) -> nn.Module:
    """Prune in a few rounds, the rate rewound to its peak in each."""
    steps = CORRECTION // ROUNDS

    def one_round(model: nn.Module, work: gp.Round) -> None:
        if work.number:
            correct(model, steps=steps, prepare=work.hold, offset=work.number)

    gp.iterate(
        model,
        one_round,
        gp.Geometric(1 - (1 - sparsity) ** (1 / ROUNDS), every=1, rounds=ROUNDS),
        steps=steps,
        rewind="learning rate",
        scope=scope,
    )
    return model


def torch_one_shot(
    model: nn.Module, sparsity: float, correct: Correct, *, together: bool, rounds: int = 1
) -> nn.Module:
    """Prune by torch.nn.utils.prune, L1 over all layers together or in each, in rounds; fine-tune after each."""
    layers = [(module, "weight") for _, module in weighted_layers(model)]
    share = 1 - (1 - sparsity) ** (1 / rounds)  # of what is left
    for number in range(rounds):
        if together:
            torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=share)
        else:
            for module, name in layers:
                torch_prune.l1_unstructured(module, name, amount=share)
        correct(model, steps=CORRECTION // rounds, offset=number)
    for module, name in layers:
        torch_prune.remove(module, name)
    return model


def torch_ao_cubic(model: nn.Module, sparsity: float, correct: Correct, *, until: float) -> nn.Module:
    """Prune by torch.ao.pruning: its weight-norm sparsifier, single weights, under its cubic scheduler."""
    from torch.ao import pruning

    sparsifier = pruning.WeightNormSparsifier(sparsity, sparse_block_shape=(1, 1), zeros_per_block=1)
    sparsifier.prepare(model, [{"tensor_fqn": f"{name}.weight"} for name, _ in weighted_layers(model)])
    events = int(until * CORRECTION) // EVERY
    scheduler = pruning.CubicSL(sparsifier, init_sl=0.0, init_t=0, delta_t=1, total_t=events, initially_zero=True)

    def event(step: int) -> None:
        if step % EVERY == 0:
            scheduler.step()
            sparsifier.step()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        correct(model, after_backward=event)
    sparsifier.squash_mask()
    return model


def fasterai_gradual(model: nn.Module, sparsity: float, correct: Correct, *, context: str, until: float) -> nn.Module:
    """Prune by fasterai's sparsifier on the cubic schedule, in the steps of its callback."""
    from fasterai.core.criteria import large_final
    from fasterai.sparse.sparsifier import Sparsifier

    sparsifier = Sparsifier(model, "weight", context, large_final, layer_type=LAYERS)
    ramp = gp.Cubic(sparsity, 0, int(until * CORRECTION), every=EVERY)
    taken = [0]

    def after_step(*_: object) -> None:
        taken[0] += 1
        if ramp(taken[0]) != ramp(taken[0] - 1):
            sparsifier.sparsify_model(ramp(taken[0]))
        sparsifier._apply_masks()

    correct(model, prepare=lambda optimizer: optimizer.register_step_post_hook(after_step))
    sparsifier._clean_buffers()
    return model


def torch_pruning_channels(
    model: nn.Module, sparsity: float, correct: Correct, *, example: Tensor, norm: int, together: bool
) -> nn.Module:
    """Remove channels by Torch-Pruning until that share of the multiply-adds is gone, then fine-tune.

    Ranked over all layers together, it cannot remove so much of some networks without removing a layer; there it ranks
    within each layer.
    """
    import torch_pruning

    def smaller(ratio: float, together: bool) -> nn.Module:
        small = copy.deepcopy(model)
        pruner = torch_pruning.pruner.MagnitudePruner(
            small,
            example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=norm),
            global_pruning=together,
            pruning_ratio=ratio,
            ignored_layers=[weighted_layers(small)[-1][1]],
        )
        pruner.step()
        return small

    def enough(small: nn.Module) -> bool:
        return multiply_adds(small, example) <= (1 - sparsity) * multiply_adds(model, example)

    together = together and enough(smaller(1.0, together=True))
    low, high = 0.0, 1.0
    for _ in range(12):  # the smallest ratio that removes enough
        middle = (low + high) / 2
        low, high = (low, middle) if enough(smaller(middle, together)) else (middle, high)
    small = smaller(high, together)
    if not enough(small):
        raise ValueError(f"Torch-Pruning cannot remove {sparsity:.0%} of the multiply-adds")
    correct(small)
    return small


def multiply_adds(model: nn.Module, example: Tensor) -> float:
    """Return the multiply-adds of one example as Torch-Pruning counts them."""
    import torch_pruning

    count, _ = torch_pruning.utils.count_ops_and_params(model, example)
    return float(count)


METHODS: dict[str, Method] = {
    "random masks": partial(ours_one_shot, score=gp.random),
    "torch.nn.utils.prune": torch_one_shot,
    "torch.ao.pruning": torch_ao_cubic,
    "fasterai": fasterai_gradual,
    "Torch-Pruning": torch_pruning_channels,
    "gradprune, one shot": ours_one_shot,
    "gradprune, iterative": ours_iterative,
    "gradprune, gradual": ours_gradual,
    "gradprune, gradual, distilled": partial(ours_gradual, distil=True),
    "gradprune, gradual, regrown": partial(ours_gradual, regrow=True),
    "gradprune, gradual, regrown, L1": partial(ours_gradual, regrow=True, l1=L1),
}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "torch.nn.utils.prune": [{"together": True}, {"together": False}, {"together": True, "rounds": ROUNDS}],
    "torch.ao.pruning": [{"until": RAMP}, {"until": 0.4}, {"until": 0.8}],
    "fasterai": [
        {"context": "global", "until": RAMP},
        {"context": "global", "until": 0.4},
        {"context": "local", "until": RAMP},
    ],
    "Torch-Pruning": [
        {"norm": 1, "together": False},
        {"norm": 2, "together": False},
        {"norm": 1, "together": True},
    ],
}
NEEDS = {"fasterai": "fasterai", "Torch-Pruning": "torch-pruning"}


Tuned = tuple[float, dict[str, Any]]  # the share of the dense rate, and an option


def corrected(cell: dict[str, Any], tuned: Tuned, seed: int) -> tuple[nn.Module, lab.data.Dataset, float]:
    """Prune and correct one dense network; return it, its data, and the seconds of processor time."""
    share, option = tuned
    name, kind = cell["data"], cell["network"]
    part = protocol.data(name, seed)
    model = protocol.dense(name, kind, seed)
    torch.manual_seed(seed)

    def correct(model: nn.Module, *, steps: int = CORRECTION, offset: int = 0, **options: Any) -> None:
        rate = share * protocol.best_rate(name, kind)
        protocol.fit(model, part, steps, rate, straight_down(steps), 1000 * (offset + 1) + seed, **options)

    if cell["method"] == "Torch-Pruning":
        option = option | {"example": part.train.x[:1]}
    start = time.process_time()
    model = METHODS[cell["method"]](model, cell["sparsity"], correct, **option)
    return model, part, time.process_time() - start


def left(cell: dict[str, Any], model: nn.Module, part: lab.data.Dataset) -> float:
    """Return the share of the weights that are not zero, of Torch-Pruning's networks that of the multiply-adds."""
    if cell["method"] == "Torch-Pruning":
        dense = protocol.network(cell["data"], cell["network"], 0)
        return multiply_adds(model, part.train.x[:1]) / multiply_adds(dense, part.train.x[:1])
    weights = [module.weight for _, module in weighted_layers(model)]
    return sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


@cache
def tune(name: str, kind: str, method: str) -> Tuned:
    """Return the share of the dense rate, and the option, that a method is best with on validation data."""
    cell = {"data": name, "network": kind, "method": method, "sparsity": TUNED_AT}
    options = OPTIONS.get(method, SCOPES)

    def score(tuned: Tuned) -> float:
        runs = [corrected(cell, tuned, seed) for seed in TUNING_SEEDS]
        return sum(lab.train.accuracy(model, part.validation) for model, part, _ in runs)

    scores = [score((share, options[0])) for share in SHARES]
    share = SHARES[scores.index(max(scores))]
    by_option = [max(scores), *(score((share, option)) for option in options[1:])]
    return share, options[by_option.index(max(by_option))]


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Measure one method at one sparsity."""
    name, kind = cell["data"], cell["network"]
    if cell["method"] == "dense":
        models = [(protocol.dense(name, kind, seed), protocol.data(name, seed)) for seed in SEEDS]
        return {
            "accuracy": [round(lab.train.accuracy(model, part.test), 4) for model, part in models],
            "rate": protocol.best_rate(name, kind),
        }
    try:
        tuned = tune(name, kind, cell["method"])
        runs = [corrected(cell, tuned, seed) for seed in SEEDS]
    except (RuntimeError, ValueError) as error:
        return {"accuracy": [], "refused": f"{type(error).__name__}: {str(error).splitlines()[0]}"[:120]}
    seconds = sorted(run[2] for run in runs)
    return {
        "accuracy": [round(lab.train.accuracy(model, part.test), 4) for model, part, _ in runs],
        "share of the dense rate": tuned[0],
        "option": tuned[1],
        "share left": round(sum(left(cell, model, part) for model, part, _ in runs) / len(runs), 4),
        "processor_s": round(seconds[len(seconds) // 2], 2),
    }


def installed(method: str) -> bool:
    """Whether what the method needs is there."""
    try:
        return method not in NEEDS or bool(version(NEEDS[method]))
    except PackageNotFoundError:
        return False


def main() -> None:
    """Measure what is not measured yet."""
    lab.start(0)
    cells: list[dict[str, Any]] = []
    for name in ("digits", "mnist1d"):
        for kind in ("perceptron", "convolutional"):
            cells.append({"data": name, "network": kind, "method": "dense", "sparsity": 0.0})
            for method in filter(installed, METHODS):
                cells += [{"data": name, "network": kind, "method": method, "sparsity": s} for s in SPARSITIES]
    about = ", ".join(f"{package} {version(package)}" for method, package in NEEDS.items() if installed(method))
    lab.experiment.run(
        Path("chapters/results/peers.json"), cells, measure, seeds=SEEDS, about=f"accuracy on test data; {about}"
    )


if __name__ == "__main__":
    main()
