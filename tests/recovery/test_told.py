"""What a file knows a call by: the same in every process for the same, and other for what is other."""

import functools
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import gradprune as gp
from gradprune.recovery.told import digest, name_of, score_of, told

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 2


def network():
    torch.manual_seed(0)
    return nn.Linear(4, 2)


def test_a_name_is_a_words_own_a_functions_or_how_it_is_written():
    assert [name_of(value) for value in ("a", len, 0.5, (2, 4))] == ["a", "len", "0.5", "(2, 4)"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 2), (1, 1.0), ("a", "b"), (None, False), ([1], (1,)), ({"a": 1}, {"a": 2}), ({1, 2}, {1, 3}),
        (X, X + 1), (X, X.double()), (X, X.reshape(4, 16)), (X.numpy(), X.numpy() + 1), (X[:, :2], X[:, 2:]),
        (nn.Linear(2, 2), nn.Linear(2, 2)), (gp.magnitude, gp.random), (gp.OneShot(0.5), gp.OneShot(0.6)),
        (functools.partial(gp.taylor, batches=[(X, Y)]), functools.partial(gp.taylor, batches=[(X, 1 - Y)])),
        (functools.partial(gp.taylor, loss=len), functools.partial(gp.snip, loss=len)),
        (functools.partial(int, base=2), functools.partial(int, base=3)), (torch.zeros(2, dtype=torch.bfloat16), 0),
    ],
)  # fmt: skip
def test_what_is_other_is_told_otherwise(one, other):
    assert told(one) != told(other)
    assert told(one) == told(one)


def test_what_has_no_words_of_its_own_goes_by_its_type():
    assert told(object()) == "object"
    assert told(torch.utils.data.DataLoader([1])) == "DataLoader"
    assert told(np.array([object()])) == "ndarray"


SCRIPT = """
import functools, sys, torch
from torch import nn
import gradprune as gp
torch.manual_seed(0)
model, x = nn.Linear(4, 2), torch.randn(16, 4)
loss = functools.partial(nn.functional.cross_entropy, label_smoothing=0.1)
score = functools.partial(gp.taylor, batches=[(x, torch.arange(16) % 2)], loss=loss)
calls = []
evaluate = lambda model: calls.append(1) or float((model.weight != 0).float().mean())
gp.sensitivity(model, evaluate, [0.5], score=score, file=sys.argv[1] + "scan")
gp.largest_sparsity(model, evaluate, at_least=0.5, tolerance=0.2, score=score, file=sys.argv[1] + "looks")
print(len(calls))
"""


def test_a_fresh_process_goes_on_from_the_file_of_a_partial_score(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "of-")]
    counts = [int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(2)]
    assert counts[0] > 4
    assert counts[1] == 0


@pytest.mark.parametrize("call", [
    lambda **how: gp.sensitivity(network(), lambda m: 0.5, [0.5], **how),
    lambda **how: gp.largest_sparsity(network(), lambda m: 0.5, at_least=0.6, tolerance=0.4, **how),
])  # fmt: skip
@pytest.mark.parametrize("score", [
    lambda model: gp.magnitude(model), functools.partial(lambda model, p: gp.magnitude(model), p=2),
    functools.partial(gp.taylor, batches=[(X, Y)], loss=lambda model, batch: 0.0),
])  # fmt: skip
def test_a_score_without_a_name_is_refused_with_a_file_before_anything_is_evaluated(tmp_path, call, score):
    with pytest.raises(ValueError, match="a file knows its score by the name"):
        call(score=score, file=tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_functions_of_one_name_are_told_apart_by_the_numbers_they_enclose():
    def power(p):
        def score(model):
            return {n: w.abs() ** p for n, w in model.named_parameters()}

        return score

    assert score_of(power(1)) != score_of(power(2))
    assert score_of(power(2)) == score_of(power(2))
    assert score_of(gp.magnitude) == "magnitude"


def test_a_scan_by_another_partial_is_refused(tmp_path):
    partial = lambda y: functools.partial(gp.taylor, batches=[(X, y)], loss=nn.functional.cross_entropy)  # noqa: E731
    scan = lambda y: gp.sensitivity(  # noqa: E731
        network(), lambda m: 0.5, [0.5], score=partial(y), file=tmp_path / "scan"
    )
    scan(Y)
    scan(Y)
    with pytest.raises(ValueError, match="other score"):
        scan(1 - Y)


def test_a_digest_tells_weights_apart():
    assert digest(network()) == digest(network())
    other = network()
    other.bias.data.add_(1)
    assert digest(network()) != digest(other)
