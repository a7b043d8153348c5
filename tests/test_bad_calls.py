"""A wrong argument is refused by the package's own words, before anything changes: every argument with every oddity."""

import copy
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gradprune as gp

PACKAGE = str(Path(gp.__file__).parent)
X = torch.linspace(-1, 1, 32).view(8, 4)
Y = torch.arange(8) % 3
LOSS = nn.functional.cross_entropy


class Case:
    """A model in training with all that may be changed by a call, and a call that is right."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.backward()
        self.optimizer.step()
        self.backward()
        self.masks = gp.Masks({"0.weight": self.model[0].weight.detach() > 0})

    def backward(self):
        self.optimizer.zero_grad()
        LOSS(self.model(X), Y).backward()

    def state(self):
        tensors = [*self.model.state_dict().values(), *(p.grad for p in self.model.parameters())]
        tensors += [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        hooks = [len(v) for k, v in vars(self.optimizer).items() if k.startswith("_optimizer_")]
        modes = [m.training for m in self.model.modules()]
        forward = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.model.modules()]
        return [t.clone() for t in tensors], hooks, modes, forward, torch.get_rng_state()

    def pairs(self):
        return [(X, Y)]


def train(model, work):
    pass


def _saved(model):
    """The model, which is in a file now."""
    gp.save(model, "saved")
    return model


def saved_at(model, path):
    """The path of a file that the model is in now."""
    gp.save(model, path)
    return path


def alive(model):
    """The share of the weights that are not zero."""
    return sum(int((p != 0).sum()) for p in model.parameters()) / sum(p.numel() for p in model.parameters())


def packed(model):
    gp.pack(model, "model.packed")
    return "model.packed"


# name -> (function of the case, its right arguments by name)
CALLS = {
    "prune": (lambda c: gp.prune, lambda c: {"model": c.model, "sparsity": 0.5}),
    "prune, threshold": (lambda c: gp.prune, lambda c: {"model": c.model, "threshold": 0.1}),
    "prune, all": (
        lambda c: gp.prune,
        lambda c: {
            "model": c.model,
            "score": gp.random,
            "sparsity": 0.5,
            "scope": "layer",
            "granularity": "weight",
            "include": "*",
            "exclude": "2.*",
            "min_keep": 1,
            "within": None,
            "axes": None,
        },
    ),
    "Pruner": (
        lambda c: gp.Pruner,
        lambda c: {
            "model": c.model,
            "optimizer": c.optimizer,
            "schedule": gp.OneShot(0.5),
            "score": gp.magnitude,
            "amount": "sparsity",
            "regrow": None,
            "within": None,
            "scope": "global",
        },
    ),
    "Masks": (lambda c: gp.Masks, lambda c: {"masks": c.masks}),
    "apply_": (lambda c: c.masks.apply_, lambda c: {"model": c.model}),
    "holds": (lambda c: c.masks.holds, lambda c: {"model": c.model}),
    "hold": (lambda c: c.masks.hold, lambda c: {"optimizer": c.optimizer, "model": c.model}),
    "mask_gradients_": (lambda c: c.masks.mask_gradients_, lambda c: {"model": c.model}),
    "from_torch": (lambda c: gp.Masks.from_torch, lambda c: {"model": c.model}),
    "from_state_dict": (lambda c: gp.Masks.from_state_dict, lambda c: {"state": c.masks.state_dict()}),
    "OneShot": (lambda c: gp.OneShot, lambda c: {"sparsity": 0.5, "at": 3}),
    "Cubic": (lambda c: gp.Cubic, lambda c: {"final": 0.5, "begin": 0, "end": 3, "every": 1, "initial": 0.0}),
    "Linear": (lambda c: gp.Linear, lambda c: {"final": 0.5, "begin": 0, "end": 3, "every": 1, "initial": 0.0}),
    "Geometric": (lambda c: gp.Geometric, lambda c: {"rate": 0.5, "every": 2, "rounds": 3}),
    "Regrow": (lambda c: gp.Regrow, lambda c: {"by": gp.gradient, "fraction": 0.3, "every": 10}),
    "clip_by_value_": (lambda c: gp.clip_by_value_, lambda c: {"params": c.model, "limit": 1e-3, "nonfinite": "raise"}),
    "clip_by_norm_": (
        lambda c: gp.clip_by_norm_,
        lambda c: {"params": c.model, "max_norm": 1e-3, "norm_type": 2.0, "nonfinite": "raise", "log": None},
    ),
    "clip_adaptive_": (
        lambda c: gp.clip_adaptive_,
        lambda c: {"params": c.model, "factor": 1e-3, "eps": 1e-3, "log": None},
    ),
    "AutoClip": (lambda c: gp.AutoClip, lambda c: {"percentile": 10.0, "window": 100, "log": None}),
    "AutoClip()": (lambda c: gp.AutoClip(10.0), lambda c: {"params": c.model}),
    "ClipLog": (lambda c: gp.ClipLog, lambda c: {"window": 10}),
    "threshold_gradients_": (lambda c: gp.threshold_gradients_, lambda c: {"params": c.model, "threshold": 1e-3}),
    "threshold_gradients_, ratio": (lambda c: gp.threshold_gradients_, lambda c: {"params": c.model, "ratio": 0.5}),
    "keep_top_gradients_": (
        lambda c: gp.keep_top_gradients_,
        lambda c: {"params": c.model, "density": 0.1, "scope": "global"},
    ),
    "ErrorFeedback": (
        lambda c: gp.ErrorFeedback,
        lambda c: {"params": c.model, "density": 0.1, "scope": "layer", "momentum": 0.5},
    ),
    "TopK": (
        lambda c: gp.TopK,
        lambda c: {"params": c.model, "density": 0.1, "momentum": 0.5, "dtype": torch.float16, "group": None},
    ),
    "gradient_norms": (lambda c: gp.gradient_norms, lambda c: {"model": c.model}),
    "jacobian_singular_values": (lambda c: gp.jacobian_singular_values, lambda c: {"f": c.model, "x": X[0], "k": 2}),
    "Recorder": (
        lambda c: gp.Recorder,
        lambda c: {"model": c.model, "optimizer": c.optimizer, "every": 1, "updates": True},
    ),
    "kth_smallest": (lambda c: gp.kth_smallest, lambda c: {"tensors": [X], "k": 3, "by": "value"}),
    "keep_largest": (lambda c: gp.keep_largest, lambda c: {"tensors": [X], "k": 3, "by": "value", "among": None}),
    "magnitude": (lambda c: gp.magnitude, lambda c: {"model": c.model}),
    "random": (lambda c: gp.random, lambda c: {"model": c.model, "generator": None}),
    "rotation": (lambda c: gp.rotation, lambda c: {"model": c.model, "period": 1.0}),
    "gradient": (lambda c: gp.gradient, lambda c: {"model": c.model, "batches": c.pairs(), "loss": LOSS}),
    "taylor": (lambda c: gp.taylor, lambda c: {"model": c.model, "batches": c.pairs(), "loss": LOSS}),
    "snip": (lambda c: gp.snip, lambda c: {"model": c.model, "batches": c.pairs(), "loss": LOSS}),
    "grasp": (lambda c: gp.grasp, lambda c: {"model": c.model, "batches": c.pairs(), "loss": LOSS}),
    "fisher": (lambda c: gp.fisher, lambda c: {"model": c.model, "batches": c.pairs(), "loss": LOSS}),
    "movement": (lambda c: gp.movement, lambda c: {"model": c.model, "batches": c.pairs(), "loss": LOSS, "lr": 0.1}),
    "activation": (lambda c: gp.activation, lambda c: {"model": c.model, "batches": c.pairs()}),
    "recalibrate_": (
        lambda c: gp.recalibrate_,
        lambda c: {"model": nn.Sequential(c.model, nn.BatchNorm1d(3)), "batches": c.pairs()},
    ),
    "synflow": (lambda c: gp.synflow, lambda c: {"model": c.model, "inputs": X}),
    "iterate": (
        lambda c: gp.iterate,
        lambda c: {
            "model": c.model,
            "train": train,
            "schedule": gp.OneShot(0.5),
            "steps": 2,
            "retrain": 1,
            "rewind": None,
            "rewind_to": 0,
            "rounds": 1,
            "score": gp.magnitude,
            "evaluate": None,
            "stop": None,
            "teacher": None,
            "checkpoint": None,
            "example": None,
            "scope": "global",
        },
    ),
    "reconstruct_": (
        lambda c: gp.reconstruct_,
        lambda c: {
            "model": c.model,
            "batches": c.pairs(),
            "sparsity": 0.5,
            "masks": None,
            "score": None,
            "scope": "layer",
            "granularity": "weight",
            "include": "*",
            "exclude": "2.*",
            "axes": None,
            "solve": "exact",
            "damp": 0.01,
        },
    ),
    "reconstruct_file": (
        lambda c: gp.reconstruct_file,
        lambda c: {
            "model": lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)),
            "source": saved_at(c.model, "dense"),
            "target": "pruned",
            "batches": c.pairs(),
            "sparsity": 0.5,
            "scope": "layer",
            "granularity": "weight",
            "include": "*",
            "exclude": "2.*",
            "axes": None,
            "solve": "exact",
            "damp": 0.01,
        },
    ),
    "reconstruct_, masks": (
        lambda c: gp.reconstruct_,
        lambda c: {"model": c.model, "batches": c.pairs(), "masks": c.masks},
    ),
    "sensitivity": (
        lambda c: gp.sensitivity,
        lambda c: {
            "model": c.model,
            "evaluate": alive,
            "sparsities": [0.5, 0.9],
            "score": gp.magnitude,
            "granularity": "weight",
            "include": "*",
            "exclude": "2.*",
            "axes": None,
            "file": None,
        },
    ),
    "largest_sparsity": (
        lambda c: gp.largest_sparsity,
        lambda c: {
            "model": c.model,
            "evaluate": lambda model: alive(model) + torch.arange(8) / 100,
            "at_least": 0.5,
            "margin": None,
            "confidence": 0.95,
            "repeats": 2,
            "tolerance": 0.1,
            "lowest": 0.0,
            "highest": 1.0,
            "probes": 1,
            "train": train,
            "steps": 1,
            "score": gp.magnitude,
            "scope": "global",
            "granularity": "weight",
            "include": "*",
            "exclude": "2.*",
            "min_keep": 1,
            "axes": None,
        },
    ),
    "fit_budget": (
        lambda c: gp.fit_budget,
        lambda c: {
            "model": c.model,
            "example": X,
            "flops": 1000,
            "evaluate": alive,
            "score": gp.magnitude,
            "granularity": "weight",
            "include": "*",
            "exclude": "2.*",
            "axes": None,
        },
    ),
    "fit_budget, latency": (
        lambda c: gp.fit_budget,
        lambda c: {
            "model": c.model,
            "example": X,
            "latency": 1.0,
            "sensitivities": {"0.weight": {0.5: 0.1}},
            "seconds": lambda name, share: share,
            "granularity": "channel",
        },
    ),
    "fit_budget, parameters": (
        lambda c: gp.fit_budget,
        lambda c: {"model": c.model, "parameters": 60, "sensitivities": {"0.weight": {0.5: 0.1}}},
    ),
    "fit_budget, bytes": (
        lambda c: gp.fit_budget,
        lambda c: {"model": c.model, "bytes": 250, "sensitivities": {"0.weight": {0.5: 0.1}}},
    ),
    "Plan.apply_": (
        lambda c: gp.fit_budget(c.model, parameters=60, sensitivities={"0.weight": {0.5: 0.1}}).apply_,
        lambda c: {"model": c.model},
    ),
    "search": (
        lambda c: gp.search,
        lambda c: {
            "model": c.model,
            "evaluate": alive,
            "space": {"sparsity": [0.5, 0.9]},
            "trials": 2,
            "sampler": "random",
            "train": train,
            "cost": alive,
            "storage": None,
            "n_jobs": 1,
            "seed": 0,
        },
    ),
    "cross_validate": (
        lambda c: gp.cross_validate,
        lambda c: {
            "build": lambda: nn.Linear(4, 3),
            "train": lambda model, data, setting: None,
            "evaluate": lambda model, data: 1.0,
            "data": (X, Y),
            "folds": 2,
            "settings": {"a": 1, "b": 2},
            "reference": "a",
            "seed": 0,
        },
    ),
    "distill_loss": (
        lambda c: gp.distill_loss,
        lambda c: {"student_logits": X, "teacher_logits": X.clone(), "temperature": 2.0},
    ),
    "Pruner, groups": (
        lambda c: gp.Pruner,
        lambda c: {
            "model": c.model,
            "optimizer": c.optimizer,
            "schedule": gp.OneShot(0.3),
            "within": None,
            "example": X,
            "granularity": "group",
            "exclude": "2.*",
        },
    ),
    "prune, groups": (
        lambda c: gp.prune,
        lambda c: {
            "model": c.model,
            "score": gp.magnitude,
            "sparsity": 0.3,
            "granularity": "group",
            "scope": "layer",
            "include": "*",
            "exclude": "2.*",
            "within": None,
            "example": X,
        },
    ),
    "shrink": (lambda c: gp.shrink, lambda c: {"model": c.model, "example": X, "masks": c.masks}),
    "quantize": (
        lambda c: gp.quantize,
        lambda c: {"model": c.model, "scheme": "int8", "masks": c.masks, "include": "*", "exclude": "2.*"},
    ),
    "dequantize": (lambda c: gp.dequantize, lambda c: {"model": gp.quantize(c.model)}),
    "compress": (
        lambda c: gp.compress,
        lambda c: {"model": c.model, "example": X, "masks": c.masks, "rounds": 3, "margin": 0.1},
    ),
    "export": (
        lambda c: gp.export,
        lambda c: {"model": c.model, "example": X, "path": "model.onnx", "masks": c.masks, "tolerance": 1e-3},
    ),
    "save": (lambda c: gp.save, lambda c: {"model": c.model, "path": "network"}),
    "load": (lambda c: gp.load, lambda c: {"model": _saved(c.model), "path": "saved"}),
    "share_weights": (
        lambda c: gp.share_weights,
        lambda c: {"model": c.model, "levels": 4, "masks": c.masks, "include": "*", "exclude": "2.*"},
    ),
    "pack": (lambda c: gp.pack, lambda c: {"model_or_file": c.model, "path": "packed", "code": "entropy"}),
    "unpack": (lambda c: gp.unpack, lambda c: {"path": packed(c.model), "into": c.model}),
    "report": (lambda c: gp.report, lambda c: {"model": c.model, "example": X, "latency": False}),
}

ODDITIES = {
    "None": lambda: None,
    "True": lambda: True,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "-1": lambda: -1,
    "1.5": lambda: 1.5,
    "10**400": lambda: 10**400,
    "1j": lambda: 1j,
    "text": lambda: "nonsense",
    "empty text": lambda: "",
    "bytes": lambda: b"x",
    "[]": lambda: [],
    "[1]": lambda: [1],
    "{}": dict,
    "{'a': 1}": lambda: {"a": 1},
    "{1: 'a'}": lambda: {1: "a"},
    "object": object,
    "class": lambda: nn.Linear,
    "tensor": lambda: torch.ones(3),
    "bool tensor": lambda: torch.ones(2, 2, dtype=torch.bool),
    "meta tensor": lambda: torch.ones(3, device="meta"),
    "array": lambda: np.ones(3),
    "number of numpy": lambda: np.float16(0.5),
    "model without parameters": nn.ReLU,
    "lazy model": lambda: nn.LazyLinear(3),
    "another model": lambda: nn.Linear(4, 3),
    "model on meta": lambda: nn.Linear(4, 3, device="meta"),
    "optimizer": lambda: torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1),
    "used-up generator": lambda: iter(()),
    "function of nothing": lambda: _of_nothing,
    "function that raises": lambda: _raises,
    "function that returns None": lambda: lambda *a, **k: None,
    "function that returns text": lambda: lambda *a, **k: "x",
    "function that returns nan": lambda: lambda *a, **k: float("nan"),
    "path": lambda: Path("/nonexistent/folder/file"),
}


def _of_nothing():
    pass


def _raises(*_, **__):
    raise Marker("a user's own error")


class Marker(Exception):
    """What a user's own function raises: it passes as it is."""


def refused_by_us(error):
    """Whether the error was raised by a line of the package that says so, or is the user's own."""
    if isinstance(error, Marker):
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    own = last.filename.startswith(PACKAGE) and (last.line or "").lstrip().startswith("raise ")
    return own and isinstance(error, ValueError | TypeError | OSError) and len(str(error)) > 10


def users_own(error, oddity):
    """What the user's own function, or model on the user's own inputs, says passes as it is."""
    if oddity == "function of nothing" and "_of_nothing() takes 0 positional arguments" in str(error):
        return True
    return any("torch/nn/modules/module.py" in frame.filename for frame in traceback.extract_tb(error.__traceback__))


def unchanged(before, after):
    tensors = all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    return tensors and before[1:4] == after[1:4] and torch.equal(before[4], after[4])


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Text is a path to `checkpoint`, which then writes a file."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_argument_is_refused_in_words_and_changes_nothing(name):
    function, arguments = CALLS[name]
    wrong, case = [], Case()
    for argument in arguments(Case()):
        for oddity, make in ODDITIES.items():
            given = arguments(case) | {argument: make()}
            before = case.state()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    function(case)(**given)
            except Exception as error:
                if not (refused_by_us(error) or users_own(error, oddity)):
                    wrong.append(f"{argument}={oddity}: {type(error).__name__}: {str(error)[:90]}")
                elif "NoneType" in str(error) and "None" not in oddity:
                    wrong.append(f"{argument}={oddity}: speaks of None, which was not given: {str(error)[:90]}")
                elif not unchanged(before, case.state()):
                    wrong.append(f"{argument}={oddity}: refused, but something changed")
                    case = Case()
            else:  # nothing was wrong with it
                case = Case()
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", CALLS)
def test_the_call_itself_is_right(name):
    """Else the test above would pass by refusing everything."""
    function, arguments = CALLS[name]
    case = Case()
    if name == "from_torch":
        nn.utils.prune.l1_unstructured(case.model[0], "weight", 0.5)
    function(case)(**arguments(copy.copy(case)))
