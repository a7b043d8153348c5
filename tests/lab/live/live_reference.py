"""What do Python, torch and gradprune answer where the live figures' arithmetic must answer the same?

Each function returns a list of cases; a case is what JavaScript is given and what it must return, as plain numbers.
"""

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import layer_reference
import torch
from batches import mulberry32, page_batches
from torch import Tensor, nn
from torch.nn import functional

import gradprune as gp
from gradprune.lab.data import Split
from gradprune.lab.live.crew import AVERAGED, GROUPS, Crew
from gradprune.weights.allocate import share_out

Case = dict[str, Any]

ACTIVATIONS = {
    "linear": nn.Identity,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
}


def reference() -> dict[str, list[Case]]:
    """Return all cases by what they are of; the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            "uniform": _uniform(),
            "networks": _networks(),
            "crossEntropy": _cross_entropy(),
            "squaredLoss": _squared_loss(),
            "sgd": _sgd(),
            "keptCount": _kept_count(),
            "keepLargest": _keep_largest(),
            "prune": _prune(),
            "shareOut": _share_out(),
            "clipByNorm": _clip_by_norm(),
            "clipByValue": _clip_by_value(),
            "hardThreshold": _thresholds("threshold", (0.0, 0.1, 0.5, 1.0, 2.0, 1e9)),
            "ratioThreshold": _thresholds("ratio", (0.0, 0.3, 1.0, 1.5, 3.0, 1e9)),
            "topFraction": _top_fraction(),
            "feedback": _feedback(),
            "training": _training(),
            "crews": _crews(),
            "sparse": _sparse(),
            "units": _units(),
            "layers": layer_reference.layers(),
            "layered": layer_reference.networks(),
            "halves": layer_reference.halves(),
            "adam": layer_reference.adam(),
            "trainings": layer_reference.trainings(),
        }


# ------------------------------------------------------------------------------------------------------- chance


def _uniform() -> list[Case]:
    seeds = (0, 1, 42, -1, 2**32 - 1, 123456789)
    return [{"name": f"seed {seed}", "seed": seed, "numbers": mulberry32(seed, 20)} for seed in seeds]


# ---------------------------------------------------------------------------------------------- networks and losses


def _model(sizes: Sequence[int], activation: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


def _networks() -> list[Case]:
    shapes = (([7, 5, 4, 3], 6), ([6, 4], 3), ([3, 8, 1, 5, 2], 1), ([8] * 21, 5))
    return [_network(sizes, name, rows) for (sizes, rows), name in itertools.product(shapes, ACTIVATIONS)]


def _network(sizes: list[int], activation: str, rows: int) -> Case:
    model = _model(sizes, activation)
    gain = 2.0 if len(sizes) < 10 else 1.4  # many layers of more are chaotic, and single precision itself is off
    for layer in _linears(model):
        nn.init.normal_(layer.weight, std=gain / layer.in_features**0.5)
        nn.init.normal_(layer.bias, std=0.3)
    parameters = _flat(model)
    inputs = torch.randn(rows, sizes[0])
    upstream = torch.randn(rows, sizes[-1])
    model.double()  # what both sides are compared with is better than either
    outputs: list[Tensor] = []
    for layer in _linears(model):
        layer.register_forward_hook(lambda _, __, output: outputs.append(output))
    logits = model(inputs.double())
    deltas = torch.autograd.grad(logits, outputs, upstream.double(), retain_graph=True)
    gradients = torch.autograd.grad(logits, list(model.parameters()), upstream.double())
    single = logits.float()
    return {
        "name": f"{sizes} {activation}",
        "sizes": sizes,
        "activation": activation,
        "parameters": parameters,
        "inputs": _list(inputs),
        "rows": rows,
        "upstream": _list(upstream),
        "logits": _list(single),
        "deltas": [_list(delta) for delta in deltas],
        "gradients": [_list(gradient) for gradient in gradients],
        "predictions": single.argmax(1).tolist(),
    }


def _sparse() -> list[Case]:
    """Perceptrons in part zero: by rows as torch has them, and as narrow as gp.shrink makes them."""
    settings = itertools.product(([7, 6, 3], [5, 8, 6, 2]), (0.0, 0.3, 0.6, 0.8, 0.9), (3, 4))
    return [_with_zeros(*setting) for setting in settings]


def _with_zeros(sizes: list[int], sparsity: float, rows: int) -> Case:
    model = _model(sizes, "relu")
    nn.init.normal_(model[0].bias)
    gp.prune(model, sparsity=sparsity, scope="layer", min_keep=1)
    with torch.no_grad():
        model[0].weight[1] = 0.0  # a unit that puts out a constant,
        model[2].weight[:, 2] = 0.0  # and one that leads nowhere
    inputs = torch.randn(rows, sizes[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that CSR is in beta
        compressed = [layer.weight.detach().to_sparse_csr() for layer in _linears(model)]
    small = gp.shrink(model, inputs)
    return {
        "name": f"{sizes} at {sparsity}, {rows} rows",
        "sizes": sizes,
        "parameters": _flat(model),
        "inputs": _list(inputs),
        "rows": rows,
        "layers": [
            {"starts": m.crow_indices().tolist(), "places": m.col_indices().tolist(), "values": _list(m.values())}
            for m in compressed
        ],
        "logits": _list(model.double()(inputs.double()).float()),
        "small": [sizes[0], *(layer.out_features for layer in _linears(small))],
    }


def _units() -> list[Case]:
    return [
        _without_units(sizes, s) for sizes in ([6, 9, 2], [64, 48, 10]) for s in (0.0, *torch.rand(9).tolist(), 1.0)
    ]


def _without_units(sizes: list[int], sparsity: float) -> Case:
    model = _model(sizes, "relu")
    weights = [_list(layer.weight) for layer in _linears(model)]
    masks = gp.prune(model, sparsity=min(sparsity, 1 - 1 / sizes[1]), granularity="channel", include="0.*", min_keep=1)
    every = [masks["0.weight"], torch.ones(sizes[2], sizes[1])]
    return {
        "name": f"{sizes} at {sparsity:.3f}",
        "sizes": sizes,
        "weights": weights,
        "sparsity": sparsity,
        "masks": [_list(mask.int()) for mask in every],
    }


def _cross_entropy() -> list[Case]:
    cases = []
    for rows, classes, scale in ((5, 10, 1.0), (7, 3, 20.0), (1, 2, 1.0), (4, 4, 5000.0)):
        logits, labels = torch.randn(rows, classes) * scale, torch.randint(classes, (rows,))
        wide = logits.double().requires_grad_()
        loss = functional.cross_entropy(wide, labels)
        (gradient,) = torch.autograd.grad(loss, wide)
        name = f"{rows} rows, {classes} classes, scale {scale:g}"
        case = {"logits": _list(logits), "labels": labels.tolist(), "classes": classes}
        cases.append({"name": name, **case, "loss": loss.item(), "gradient": _list(gradient)})
    return cases


def _squared_loss() -> list[Case]:
    cases = []
    for shape in ((6, 1), (5, 3)):
        outputs, targets = torch.randn(shape), torch.randn(shape)
        wide = outputs.double().requires_grad_()
        loss = functional.mse_loss(wide, targets.double())
        (gradient,) = torch.autograd.grad(loss, wide)
        case = {"outputs": _list(outputs), "targets": _list(targets), "loss": loss.item(), "gradient": _list(gradient)}
        cases.append({"name": f"shape {shape}", **case})
    return cases


# ----------------------------------------------------------------------------------------------------------- steps


def _sgd() -> list[Case]:
    settings = ((0.1, 0.0, 0.0), (0.1, 0.9, 0.0), (0.05, 0.9, 0.01), (0.1, 0.0, 0.1), (0.3, 0.5, 0.3))
    return [_steps(*setting, held) for setting, held in itertools.product(settings, (False, True))]


def _steps(rate: float, momentum: float, decay: float, held: bool) -> Case:
    sizes = [6, 5, 3]
    model = _model(sizes, "relu")
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum, weight_decay=decay)
    masks = gp.prune(model, sparsity=0.6) if held else None
    if masks is not None:
        masks.hold(optimizer)
    parameters, gradients = _flat(model), []
    for _ in range(20):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        gradients.append(_joined(parameter.grad for parameter in model.parameters()))
        optimizer.step()
    optimizer.state_dict()  # forgets what is remembered of held entries
    buffers = [optimizer.state[parameter].get("momentum_buffer") for parameter in model.parameters()]
    return {
        "name": f"rate {rate}, momentum {momentum}, decay {decay}, {'held' if held else 'free'}",
        "sizes": sizes,
        "parameters": parameters,
        "gradients": gradients,
        "optimizer": {"rate": rate, "momentum": momentum, "decay": decay},
        "masks": None if masks is None else _as_lists(masks),
        "after": _flat(model),
        "velocities": _joined(buffers) if momentum else None,
    }


def _training() -> list[Case]:
    settings = (("relu", False, None), ("tanh", True, None), ("gelu", False, 0.2), ("sigmoid", True, 0.2))
    return [_run(*setting) for setting in settings]


def _run(activation: str, held: bool, max_norm: float | None) -> Case:
    sizes, rows = [6, 8, 3], 11
    model = _model(sizes, activation)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)
    masks = gp.prune(model, sparsity=0.5) if held else None
    if masks is not None:
        masks.hold(optimizer)
    parameters = _flat(model)
    inputs, labels = torch.randn(rows, sizes[0]), torch.randint(sizes[-1], (rows,))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), labels)
        loss.backward()
        if max_norm is not None:
            gp.clip_by_norm_(model, max_norm)
        optimizer.step()
        losses.append(loss.item())
    return {
        "name": f"{activation}, {'held' if held else 'free'}, clipped at {max_norm}",
        "sizes": sizes,
        "activation": activation,
        "parameters": parameters,
        "inputs": _list(inputs),
        "labels": labels.tolist(),
        "optimizer": {"rate": 0.2, "momentum": 0.9, "decay": 1e-3},
        "masks": None if masks is None else _as_lists(masks),
        "maxNorm": max_norm,
        "losses": losses,
        "after": _flat(model),
    }


def _crews() -> list[Case]:
    settings = itertools.product(GROUPS, (0, 1, 2), (1.0, 0.3), ("each", "one"))
    return [_crew(*setting) for setting in settings if setting[0] == "asynchronous" or setting[1] == 0]


def _crew(way: str, age: int, density: float, decides: Any) -> Case:
    """Four workers, pruned in the middle, between two averages."""
    sizes, rows, batch, period, steps = [6, 8, 3], 38, 16, 3, 20
    sparsity = 0.6  # not a half, of which as many are zero as are not
    model = _model(sizes, "relu")
    examples = Split(torch.randn(rows, sizes[0]), torch.randint(sizes[-1], (rows,)))
    crew = Crew(model, way, period=period, age=age, density=density)
    differ, zeros, averaged = [], [], []
    for step, chosen in enumerate(page_batches(3, rows, batch, steps)):
        if step == steps // 2:
            crew.prune(sparsity, decides)
        crew.step(examples, torch.tensor(chosen))
        averaged.append(crew.average_when_due())
        if crew.masks:
            differ.append(crew.differing())
            zeros.append(crew.zeros())
    assert way not in AVERAGED or (steps // 2) % period
    return {
        "name": f"{way}, age {age}, density {density}, {decides}",
        "made": {"way": way, "age": age, "density": density, "period": period, "batch": batch, "seed": 3},
        "optimizer": {"rate": 0.05, "momentum": 0.9, "decay": 0},
        "sizes": sizes,
        "parameters": _flat(model),
        "inputs": _list(examples.x),
        "labels": examples.y.tolist(),
        "steps": steps,
        "decides": decides,
        "sparsity": sparsity,
        "averaged": averaged,
        "differ": differ,
        "zeros": zeros,
        "masks": [_as_lists(masks) for masks in crew.masks],
        "after": [_flat(one) for one in crew.models],
    }


# ------------------------------------------------------------------------------------------------------------ ranks


def _kept_count() -> list[Case]:
    totals = (0, 1, 2, 3, 5, 7, 10, 100, 3552, 3555, 100_001)
    sparsities = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.999, 1.0)
    return [
        {
            "name": f"{sparsity} of {total}",
            "total": total,
            "sparsity": sparsity,
            "kept": total - round(sparsity * total),
        }
        for total, sparsity in itertools.product(totals, sparsities)
    ]


def _scores() -> dict[str, list[Tensor]]:
    few = torch.randint(-2, 3, (40,)).float()
    return {
        "random": [torch.randn(12), torch.randn(1), torch.randn(20)],
        "ties": [few[:15], few[15:]],
        "magnitudes with ties": [few[:7].abs(), few[7:30].abs(), few[30:].abs()],
        "zeros of both signs": [torch.tensor([0.0, -0.0, 1.0, -0.0]), torch.tensor([-0.0, 0.0, -1.0, 0.0])],
        "all equal": [torch.full((9,), 0.1), torch.full((4,), 0.1)],
        "ascending": [torch.arange(30.0)],
        "descending": [-torch.arange(30.0)],
        "extremes": [torch.tensor([1e-45, 0.0, 3e38, -3e38, float("inf"), -float("inf"), 1e-38, -1e-45])],
        "neighbours": [torch.nextafter(torch.ones(9), torch.arange(9.0) % 3)],
    }


def _keep_largest() -> list[Case]:
    cases = []
    for name, scores in _scores().items():
        total = sum(score.numel() for score in scores)
        for k in sorted({0, 1, 2, total // 3, total // 2, total - 1, total}):
            masks = [_list(mask.int()) for mask in gp.keep_largest(scores, k)]
            cases.append({"name": f"{name}, k = {k}", "scores": [_list(s) for s in scores], "k": k, "masks": masks})
    return cases


def _pruned_weights() -> dict[str, list[Tensor]]:
    tiny = torch.randn(3, 4) * 1e-4  # a layer that a ranking over all would empty
    few = torch.randint(-2, 3, (60,)).float()
    return {
        "two layers": [torch.randn(8, 6), torch.randn(4, 8)],
        "ties and zeros": [few[:24].view(6, 4), few[24:36].view(2, 6), -few[36:].view(12, 2)],
        "a tiny layer": [torch.randn(5, 6), tiny, torch.randn(2, 3)],
        "two tiny layers": [tiny.clone(), torch.randn(10, 3), tiny * 10],
        "equal layers": [torch.randn(4, 4) for _ in range(7)],
        "single weights": [torch.randn(1, 1) for _ in range(5)],
    }


def _prune() -> list[Case]:
    sparsities = (0.0, 0.1, 0.25, 0.5, 0.6, 0.9, 0.95, 0.97, 0.99, 1.0)
    settings = itertools.product(_pruned_weights().items(), sparsities, ("global", "layer"), ("magnitude", "largest"))
    return [_pruned(name, weights, *setting) for (name, weights), *setting in settings]


def _pruned(name: str, weights: list[Tensor], sparsity: float, scope: Any, score: str) -> Case:
    model = nn.Sequential(*(nn.Linear(w.shape[1], w.shape[0]) for w in weights))
    for layer, weight in zip(_linears(model), weights, strict=True):
        layer.weight.data.copy_(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that become empty
        ranked = gp.magnitude if score == "magnitude" else _minus_magnitude
        masks = gp.prune(model, ranked, sparsity=sparsity, scope=scope)
    gone = [w[~mask].abs() for w, mask in zip(weights, masks.values(), strict=True)]
    return {
        "name": f"{name}, {sparsity}, {scope}, {score}",
        "weights": [_list(w) for w in weights],
        "sparsity": sparsity,
        "scope": scope,
        "score": score,
        "masks": _as_lists(masks),
        "after": [_list(layer.weight) for layer in _linears(model)],
        "gone": float(torch.cat([torch.zeros(1), *gone]).max()),
    }


def _minus_magnitude(model: nn.Module) -> dict[str, Tensor]:
    return {name: -score for name, score in gp.magnitude(model).items()}


def _share_out() -> list[Case]:
    settings = [
        (sizes, round(share * sum(sizes)))
        for sizes in ([3072, 480], [5, 5, 5], [1, 1000, 10, 300], [7] * 13, [100], [12, 30, 2])
        for share in (0.0, 0.01, 0.1, 1 / 3, 0.5, 0.77, 1.0)
    ]
    settings += [([10, 1, 2], 10), ([1024, 7, 10, 480], 402)]  # a plain sum rounds so that another layer gets one more
    cases = []
    for sizes, total in settings:
        low = [int(total >= len(sizes))] * len(sizes)
        counts = share_out([float(n) for n in sizes], total, low=low, high=sizes)
        given = {"shares": sizes, "total": total, "low": low, "high": sizes}
        cases.append({"name": f"{total} over {sizes}", **given, "counts": counts})
    return cases


# -------------------------------------------------------------------------------------------------------- gradients


def _gradients() -> list[Tensor]:
    return [torch.randn(5, 3), torch.tensor([0.5, -0.5, 0.1, -0.1, 0.0, -2.0]), torch.randn(4)]


def _parameters(gradients: list[Tensor]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return parameters


def _grads(parameters: list[nn.Parameter]) -> list[list[float]]:
    return [_list(parameter.grad) for parameter in parameters if parameter.grad is not None]


def _clip_by_norm() -> list[Case]:
    cases = []
    settings = [
        ([scale * gradient for gradient in _gradients()], max_norm)
        for scale, max_norm in itertools.product((1e-4, 1e-3, 1.0, 1e3, 1e15), (1e-3, 1.0, 100.0))
    ]
    settings += [([torch.tensor([3.0]), torch.tensor([-4.0])], 5.0)]  # just as much as is allowed
    for gradients, max_norm in settings:
        parameters = _parameters(gradients)
        before = gp.clip_by_norm_(parameters, max_norm)
        given, after = [_list(g) for g in gradients], _grads(parameters)
        case = {"given": given, "maxNorm": max_norm, "before": before.item(), "after": after}
        cases.append({"name": f"{before.item():g} to {max_norm}", **case, "unchanged": given == after})
    assert {case["unchanged"] for case in cases} == {True, False}
    return cases


def _clip_by_value() -> list[Case]:
    cases = []
    for limit in (0.1, 0.3, 0.5, 1.0, 1 / 3, 2.0, 1e6):  # some of no float32, above or below the next one
        gradients = _gradients()
        parameters = _parameters(gradients)
        gp.clip_by_value_(parameters, limit)
        case = {"given": [_list(g) for g in gradients], "limit": limit, "after": _grads(parameters)}
        cases.append({"name": f"limit {limit}", **case})
    return cases


def _thresholds(rule: str, amounts: Sequence[float]) -> list[Case]:
    cases = []
    for amount, gradients in itertools.product(amounts, (_gradients(), [torch.full((7,), -0.1), torch.zeros(3)])):
        parameters = _parameters(gradients)
        share = gp.threshold_gradients_(parameters, **{rule: amount})
        case = {"given": [_list(g) for g in gradients], "amount": amount, "after": _grads(parameters), "share": share}
        cases.append({"name": f"{rule} {amount} of {len(gradients)} tensors", **case})
    return cases


def _top_fraction() -> list[Case]:
    cases = []
    ties = [torch.tensor([1.0, -1.0, 0.0, 1.0]), torch.tensor([-1.0, 0.0, 1.0, -0.0, 1.0, -1.0])]
    for density, gradients in itertools.product((0.0, 0.001, 0.1, 0.25, 0.5, 0.9, 1.0), (_gradients(), ties)):
        parameters = _parameters(gradients)
        share = gp.keep_top_gradients_(parameters, density)
        case = {"given": [_list(g) for g in gradients], "density": density, "after": _grads(parameters), "share": share}
        cases.append({"name": f"density {density} of {len(gradients)} tensors", **case})
    return cases


def _feedback() -> list[Case]:
    cases = []
    for density in (0.0, 0.05, 0.3, 1.0):
        parameters, steps = _parameters(_gradients()), []
        feedback = gp.ErrorFeedback(parameters, density)
        for _ in range(10):
            for parameter, gradient in zip(parameters, _gradients(), strict=True):
                parameter.grad = gradient
            given, share = _grads(parameters), feedback.step()
            waiting = [_list(residual) for residual in feedback.residuals.values()]
            steps.append({"given": given, "share": share, "sent": _grads(parameters), "waiting": waiting})
        cases.append({"name": f"density {density}", "density": density, "steps": steps})
    return cases


# ---------------------------------------------------------------------------------------------------- plain numbers


def _linears(model: nn.Module) -> list[nn.Linear]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


def _flat(model: nn.Module) -> list[float]:
    return _joined(model.parameters())


def _joined(tensors: Any) -> list[float]:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).tolist()


def _list(tensor: Tensor) -> list[Any]:
    return tensor.detach().reshape(-1).tolist()


def _as_lists(masks: gp.Masks) -> list[list[int]]:
    return [_list(mask.int()) for mask in masks.values()]
