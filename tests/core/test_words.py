"""Does a keyword of another library come back with the word that is ours?"""

import copy
import inspect

import pytest
import torch
from torch import nn

import gradprune as gp


def made():
    model = nn.Linear(4, 4)
    model(torch.ones(1, 4)).sum().backward()
    return model


WORDS = [
    (lambda m, /, **k: gp.prune(m, **k), "prune", {"amount": 0.5}, "sparsity= is what it is called here"),
    (lambda m, /, **k: gp.prune(m, **k), "prune", {"sparsity": 0.5, "dim": 0}, 'write granularity="channel"'),
    (lambda m, /, **k: gp.prune(m, **k), "prune", {"n": 2, "m": 4}, 'write granularity="2:4"'),
    (lambda m, /, **k: gp.prune(m, **k), "prune", {"density": 0.1}, "write sparsity=1 - density"),
    (lambda m, /, **k: gp.prune(m, **k), "prune", {"sparcity": 0.1}, r"did you mean sparsity=\?"),
    (lambda m, /, **k: gp.prune(m, **k), "prune", {"zzz": 0.1}, "it takes model, score, sparsity, threshold, scope"),
    (lambda m, /, **k: gp.clip_by_value_(m, **k), "clip_by_value_", {"clip_value": 1.0}, "limit= is what"),
    (lambda m, /, **k: gp.clip_by_value_(m, **k), "clip_by_value_", {"max_norm": 1.0}, "limit= is what"),
    (lambda m, /, **k: gp.clip_by_norm_(m, **k), "clip_by_norm_", {"clip_value": 1.0}, "max_norm= is what"),
    (
        lambda m, /, **k: gp.clip_by_norm_(m, 1.0, **k),
        "clip_by_norm_",
        {"error_if_nonfinite": True},
        "nonfinite= is what",
    ),
    (
        lambda m, /, **k: gp.keep_top_gradients_(m, **k),
        "keep_top_gradients_",
        {"compress_ratio": 0.1},
        "density= is what",
    ),
    (lambda m, /, **k: gp.AutoClip(**k), "AutoClip", {"percentil": 10}, "did you mean percentile="),
    (lambda m, /, **k: gp.ErrorFeedback(m, **k), "ErrorFeedback", {"amount": 0.1}, "density= is what"),
    (lambda m, /, **k: gp.Cubic(**k), "Cubic", {"final_sparsity": 0.5, "begin": 0, "end": 9}, "final= is what"),
    (lambda m, /, **k: gp.Geometric(every=1, rounds=3, **k), "Geometric", {"amount": 0.5}, "rate= is what"),
    (lambda m, /, **k: gp.OneShot(**k), "OneShot", {"amount": 0.5}, "sparsity= is what"),
    (lambda m, /, **k: _pruner(m, **k), "Pruner", {"pruning_ratio": 0.5}, "the schedule says how much is pruned"),
    (lambda m, /, **k: _pruner(m, **k), "Pruner", {"criterion": gp.random}, "score= is what"),
    (
        lambda m, /, **k: gp.iterate(m, print, gp.OneShot(0.5), steps=1, **k),
        "iterate",
        {"sparsity": 0.5},
        "the schedule says",
    ),
    (
        lambda m, /, **k: gp.iterate(m, print, gp.OneShot(0.5), steps=1, **k),
        "iterate",
        {"skip": "*"},
        "exclude= is what",
    ),
]


def _pruner(model, **more):
    return gp.Pruner(model, torch.optim.SGD(model.parameters(), lr=0.1), gp.OneShot(0.5), **more)


def _iterate(model, **more):
    return gp.iterate(model, print, gp.OneShot(0.5), steps=1, **more)


@pytest.mark.parametrize(("call", "name", "given", "meant"), WORDS)
def test_a_foreign_keyword_is_answered_by_ours_before_anything_changes(call, name, given, meant):
    model = made()
    before = copy.deepcopy(model.state_dict()), model.weight.grad.clone()
    foreign = [word for word in given if word not in ("sparsity", "begin", "end") or name == "iterate"]
    with pytest.raises(TypeError, match=f"^{name} has no argument '{foreign[0]}': {meant}"):
        call(model, **given)
    assert all(torch.equal(value, before[0][key]) for key, value in model.state_dict().items())
    assert torch.equal(model.weight.grad, before[1])


def test_what_explains_keywords_keeps_its_signature_and_its_own_errors():
    assert list(inspect.signature(gp.clip_by_value_).parameters) == ["params", "limit", "nonfinite", "log"]
    assert list(inspect.signature(gp.Cubic).parameters) == ["final", "begin", "end", "every", "initial"]
    assert list(inspect.signature(gp.AutoClip).parameters) == ["percentile", "window", "nonfinite", "log"]
    assert gp.prune.__name__ == "prune"
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'end'"):
        gp.Cubic(0.5, 0)
    assert copy.deepcopy(gp.Cubic(0.5, 0, 3)) == gp.Cubic(0.5, 0, 3)
