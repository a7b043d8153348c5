"""Is every architecture of chapter 7 trained, pruned, held and judged by the one protocol?"""

import copy
import dataclasses
import math

import pytest
import torch

import gradprune as gp
from gradprune import lab
from gradprune.lab import zoo
from gradprune.lab.zoo import base, tasks

every = pytest.mark.parametrize(
    "architecture", [*zoo.ARCHITECTURES, *zoo.TODAY], ids=lambda architecture: architecture.name
)


def short(architecture: zoo.Architecture, steps: int = 4) -> zoo.Architecture:
    """The same row with a training of a few steps."""
    return dataclasses.replace(architecture, steps=steps)


@every
def test_a_row_trains_prunes_holds_and_is_scored(architecture: zoo.Architecture) -> None:
    task = architecture.task(0)
    model = base.network(architecture, 0)
    before = copy.deepcopy(model.state_dict())
    base.train(architecture, model, task, 2, rate=architecture.rate, seed=0)
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    masks = base.prune(architecture, model, "magnitude", "layer", 0.5, 0)
    eligible = sum(mask.numel() for mask in masks.values())
    assert masks.sparsity == pytest.approx(0.5, abs=0.51 / eligible + 0.5 * len(masks) / eligible)
    pruned = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    base.train(architecture, model, task, 2, rate=architecture.rate, seed=1, masks=masks)
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].any()
    assert any(not torch.equal(value, model.get_parameter(name)) for name, value in pruned.items())
    for part in ("validation", "test"):
        assert math.isfinite(base.score(task, model, part))
        assert all(math.isfinite(value) for value in base.details(task, model, part).values())


@every
def test_a_rows_network_and_data_are_those_of_its_seed(architecture: zoo.Architecture) -> None:
    first, again, other = (base.network(architecture, seed) for seed in (0, 0, 1))
    same = [torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True)]
    assert all(same)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    assert base.score(architecture.task(0), first, "test") == base.score(architecture.task(0), again, "test")


@every
def test_the_test_part_is_not_what_is_chosen_on(architecture: zoo.Architecture) -> None:
    task, model = architecture.task(0), base.network(architecture, 0)
    base.train(architecture, model, task, 2, rate=architecture.rate, seed=0)
    validation, test = (base.score(task, model, part) for part in ("validation", "test"))
    assert validation != test or architecture.metric == "accuracy"  # two shares of few examples may be equal


@every
def test_a_row_says_what_counts_before_it_is_run(architecture: zoo.Architecture) -> None:
    assert set(architecture.claims) <= set(lab.claims.all_claims())
    assert {lab.claims.all_claims()[claim].chapter for claim in architecture.claims} == {7}
    assert architecture.rate in architecture.rates
    assert len(architecture.rates) == 3


def test_names_are_unique_and_an_unknown_one_is_an_error() -> None:
    names = [architecture.name for architecture in (*zoo.ARCHITECTURES, *zoo.TODAY)]
    assert len(set(names)) == len(names)
    assert zoo.by_name(names[-1]) is zoo.TODAY[-1]
    with pytest.raises(ValueError, match=r"unknown architecture 'perceptron'; known are .*'perceptron, SGD'"):
        zoo.by_name("perceptron")


def test_one_metric_has_one_direction() -> None:
    kinds = {(a.metric, a.higher) for a in zoo.ARCHITECTURES}
    assert len(kinds) == len({metric for metric, _ in kinds})


def test_a_level_is_reached_at_its_edge_in_either_direction() -> None:
    accuracy, error = zoo.by_name("logistic regression"), zoo.by_name("linear regression")
    assert accuracy.reaches(accuracy.level)
    assert not error.reaches(error.level + 0.01)


def test_random_pruning_depends_on_the_seed_and_on_nothing_else() -> None:
    architecture = zoo.by_name("logistic regression")
    one, again, other = (
        base.prune(architecture, base.network(architecture, 0), "random", "global", 0.9, seed)["weight"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_the_rate_falls_on_a_straight_line_from_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, *args: object, **kwargs: object) -> None:
            rates.append(self.param_groups[0]["lr"])
            super().step()

    monkeypatch.setitem(base.OPTIMIZERS, "sgd", Watched)
    architecture = dataclasses.replace(zoo.by_name("one weight"), optimizer="sgd", rate=0.4, steps=8)
    model, task = base.network(architecture, 0), architecture.task(0)
    base.train(architecture, model, task, 4, rate=0.4, seed=0)
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_two_players_take_turns_each_with_its_own_parameters_and_held_masks() -> None:
    class Game:
        """One player wants its output large, the other small; each moves its own weights alone."""

        def players(self, model: torch.nn.Module) -> list[base.Player]:
            x = torch.ones(1, 4)
            return [
                (model[0].parameters(), lambda generator: -model[0](x).sum()),
                (model[1].parameters(), lambda generator: model[1](x).sum()),
            ]

        def loss(self, model: torch.nn.Module, generator: torch.Generator) -> torch.Tensor:
            raise AssertionError("a task with players is not asked for its loss")

        def score(self, model: torch.nn.Module, part: str) -> float:
            return 0.0

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    before = [layer.weight.detach().clone() for layer in model]
    masks = gp.prune(model, sparsity=0.5, include="0.weight")
    architecture = dataclasses.replace(zoo.by_name("one weight"), optimizer="sgd")
    base.train(architecture, model, Game(), 3, rate=0.1, seed=0, masks=masks)
    kept = masks["0.weight"]
    assert bool((model[0].weight[kept] > before[0][kept]).all())
    assert not model[0].weight[~kept].any()
    assert bool((model[1].weight < before[1]).all())


def test_the_sparse_line_is_made_by_its_eight_weights() -> None:
    weights = tasks.true_weights(3)
    assert (weights != 0).sum() == tasks.RELEVANT
    split = tasks.sparse_line(3).test
    noise = split.y.numpy()[:, 0] - split.x.numpy() @ weights
    assert noise.std() == pytest.approx(tasks.NOISE, rel=0.1)


def test_a_window_holds_the_past_alone_and_none_reaches_over_an_edge() -> None:
    task = tasks.own_past(0)
    x, y = task.train.x, task.train.y
    assert torch.equal(x[1:, -1], y[:-1, 0])  # what was to be told is the newest of the next window
    before, after = task.train.y[-1, 0], task.validation.x
    assert not (after == before).any()


def test_the_language_model_sees_no_later_character() -> None:
    model = base.network(zoo.by_name("Transformer, text"), 0).eval()
    x = zoo.sequences.text()[:32].repeat(2, 1)
    x[1, 20:] = 0
    with torch.no_grad():
        first, second = model(x)
    torch.testing.assert_close(first[:20], second[:20])
    assert not torch.allclose(first[20:], second[20:])


def test_the_parts_of_the_text_share_no_block() -> None:
    task = zoo.sequences.descriptions(0)
    total = len(zoo.sequences.text())
    assert len(task.train) + len(task.validation) + len(task.test) == total
    spelled = {part: "".join(zoo.sequences.ALPHABET[i] for i in getattr(task, part)) for part in ("train", "test")}
    assert spelled["test"][:200] not in spelled["train"]
