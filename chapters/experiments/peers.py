"""Chapter 5: at equal sparsity and equal budget, which library and which way keep the most accuracy?

`python chapters/experiments/peers.py` writes chapters/results/peers.json; a run that was stopped goes on where it was.
It needs `pip install torch-pruning`, and fasterai where it can be had; what is missing is left out.

Every method starts from the same dense networks and has the same number of steps to prune and correct
(`protocol.py`). Each is tuned in the same way: the peak of its learning rate, three shares of the dense one, by the
mean validation accuracy at 95 % of two seeds that are not used again. Then five fresh seeds, read once on test data.
Torch-Pruning removes channels; its sparsity is the share of the multiply-adds that is gone.
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
ROUNDS = 4
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)

Correct = Callable[..., None]
Method = Callable[[nn.Module, float, Correct], nn.Module]


def weighted_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the layers whose weights are pruned, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LAYERS)]


def ours_one_shot(model: nn.Module, sparsity: float, correct: Correct, score: Any = gp.magnitude) -> nn.Module:
    """Prune once, all layers together; hold while correcting."""
    masks = gp.prune(model, score, sparsity=sparsity)
    correct(model, prepare=masks.hold)
    return model


def ours_gradual(model: nn.Module, sparsity: float, correct: Correct, *, distil: bool = False) -> nn.Module:
    """Prune on the cubic schedule while correcting, with the dense network as teacher if asked."""
    teacher = copy.deepcopy(model).eval() if distil else None
    ramp = gp.Cubic(sparsity, 0, int(RAMP * CORRECTION), every=EVERY)

    def taught(scores: Tensor, y: Tensor, x: Tensor) -> Tensor:
        assert teacher is not None
        with torch.no_grad():
            wanted = teacher(x)
        return 0.5 * functional.cross_entropy(scores, y) + 0.5 * gp.distill_loss(scores, wanted, 2.0)

    correct(model, prepare=lambda o: gp.Pruner(model, o, ramp), loss=taught if distil else None)
    return model


def ours_iterative(model: nn.Module, sparsity: float, correct: Correct) -> nn.Module:
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
    )
    return model


def torch_one_shot(model: nn.Module, sparsity: float, correct: Correct) -> nn.Module:
    """Prune by torch.nn.utils.prune, L1 over all layers together, then fine-tune."""
    layers = [(module, "weight") for _, module in weighted_layers(model)]
    torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=sparsity)
    correct(model)
    for module, name in layers:
        torch_prune.remove(module, name)
    return model


def torch_ao_cubic(model: nn.Module, sparsity: float, correct: Correct) -> nn.Module:
    """Prune by torch.ao.pruning: its weight-norm sparsifier, single weights, under its cubic scheduler."""
    from torch.ao import pruning

    sparsifier = pruning.WeightNormSparsifier(sparsity, sparse_block_shape=(1, 1), zeros_per_block=1)
    sparsifier.prepare(model, [{"tensor_fqn": f"{name}.weight"} for name, _ in weighted_layers(model)])
    events = int(RAMP * CORRECTION) // EVERY
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


def fasterai_gradual(model: nn.Module, sparsity: float, correct: Correct) -> nn.Module:
    """Prune by fasterai's sparsifier on the cubic schedule, in the steps of its callback."""
    from fasterai.core.criteria import large_final
    from fasterai.sparse.sparsifier import Sparsifier

    sparsifier = Sparsifier(model, "weight", "global", large_final, layer_type=LAYERS)
    ramp = gp.Cubic(sparsity, 0, int(RAMP * CORRECTION), every=EVERY)
    taken = [0]

    def after_step(*_: object) -> None:
        taken[0] += 1
        if ramp(taken[0]) != ramp(taken[0] - 1):
            sparsifier.sparsify_model(ramp(taken[0]))
        sparsifier._apply_masks()

    correct(model, prepare=lambda optimizer: optimizer.register_step_post_hook(after_step))
    sparsifier._clean_buffers()
    return model


def torch_pruning_channels(model: nn.Module, sparsity: float, correct: Correct, example: Tensor) -> nn.Module:
    """Remove channels by Torch-Pruning until that share of the multiply-adds is gone, then fine-tune."""
    import torch_pruning

    last = weighted_layers(model)[-1][1]
    dense, _ = torch_pruning.utils.count_ops_and_params(model, example)

    def smaller(ratio: float) -> nn.Module:
        small = copy.deepcopy(model)
        pruner = torch_pruning.pruner.MagnitudePruner(
            small,
            example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=1),
            global_pruning=False,
            pruning_ratio=ratio,
            ignored_layers=[weighted_layers(small)[-1][1]],
        )
        pruner.step()
        return small

    assert isinstance(last, nn.Linear)
    low, high = 0.0, 1.0
    for _ in range(12):  # the smallest ratio that removes enough
        middle = (low + high) / 2
        left, _ = torch_pruning.utils.count_ops_and_params(smaller(middle), example)
        low, high = (middle, high) if left > (1 - sparsity) * dense else (low, middle)
    small = smaller(high)
    correct(small)
    return small


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
}
NEEDS = {"fasterai": "fasterai", "Torch-Pruning": "torch-pruning"}


def corrected(cell: dict[str, Any], share: float, seed: int) -> tuple[nn.Module, lab.data.Dataset, float]:
    """Prune and correct one dense network; return it, its data, and the seconds of processor time."""
    name, kind = cell["data"], cell["network"]
    part = protocol.data(name, seed)
    model = protocol.dense(name, kind, seed)
    torch.manual_seed(seed)

    def correct(model: nn.Module, *, steps: int = CORRECTION, offset: int = 0, **options: Any) -> None:
        rate = share * protocol.best_rate(name, kind)
        protocol.fit(model, part, steps, rate, straight_down(steps), 1000 * (offset + 1) + seed, **options)

    method = METHODS[cell["method"]]
    if cell["method"] == "Torch-Pruning":
        method = partial(torch_pruning_channels, example=part.train.x[:1])
    start = time.process_time()
    model = method(model, cell["sparsity"], correct)
    return model, part, time.process_time() - start


def left(model: nn.Module) -> float:
    """Return the share of the weights that are not zero."""
    weights = [module.weight for _, module in weighted_layers(model)]
    return sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


@cache
def best_share(name: str, kind: str, method: str) -> float:
    """Return the share of the dense rate that a method's networks are best with on validation data."""
    cell = {"data": name, "network": kind, "method": method, "sparsity": TUNED_AT}

    def score(share: float) -> float:
        runs = [corrected(cell, share, seed) for seed in TUNING_SEEDS]
        return sum(lab.train.accuracy(model, part.validation) for model, part, _ in runs)

    return max(SHARES, key=score)


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
        share = best_share(name, kind, cell["method"])
    except (RuntimeError, ValueError) as error:
        return {"accuracy": [], "refused": f"{type(error).__name__}: {str(error).splitlines()[0]}"[:120]}
    runs = [corrected(cell, share, seed) for seed in SEEDS]
    seconds = sorted(run[2] for run in runs)
    return {
        "accuracy": [round(lab.train.accuracy(model, part.test), 4) for model, part, _ in runs],
        "rate": share * protocol.best_rate(name, kind),
        "nonzero": round(sum(left(model) for model, _, _ in runs) / len(runs), 4),
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
