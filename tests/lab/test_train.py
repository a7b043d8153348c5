"""Is training the same for every model with one seed, and blind to the test part?"""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional

import gradprune as gp
from gradprune.lab import models, train
from gradprune.lab.data import Dataset, Split


class Untouchable:
    """A test part that nobody may read."""

    def __getattr__(self, name):
        raise AssertionError(f"the test part was read: .{name}")


def dataset(examples=50, test=None):
    generator = torch.Generator().manual_seed(0)
    made = [
        Split(torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator))
        for n in (examples, 20)
    ]
    return Dataset("made", *made, Untouchable() if test is None else test, 3)


def fitted(seed=0, noise=False, steps=12, **options):
    torch.manual_seed(0)
    model = models.mlp([4, 8, 3])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    draw = (lambda step: torch.rand(step + 1)) if noise else None
    history = train.fit(
        model, dataset(), steps=steps, optimizer=optimizer, batch_size=16, seed=seed, after_backward=draw, **options
    )
    return history, model


def test_training_is_deterministic_and_its_batches_do_not_depend_on_what_else_draws():
    (one, first), (two, second), (other, _) = fitted(), fitted(noise=True), fitted(seed=1)
    assert one == two
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert one.losses[0] != other.losses[0]


def test_the_losses_are_those_of_a_loop_written_by_hand():
    history, _ = fitted(steps=6)
    torch.manual_seed(0)
    twin, data = models.mlp([4, 8, 3]), dataset()
    generator, losses, accuracies = torch.Generator().manual_seed(0), [], []
    for _ in range(2):  # two epochs were begun: 50 examples make 4 batches of 16
        order = torch.randperm(50, generator=generator)
        for begin in range(0, 50, 16):
            if len(losses) == 6:
                break
            batch = order[begin : begin + 16]
            loss = functional.cross_entropy(twin(data.train.x[batch]), data.train.y[batch])
            grads = torch.autograd.grad(loss, list(twin.parameters()))
            with torch.no_grad():
                for parameter, grad in zip(twin.parameters(), grads, strict=True):
                    parameter -= 0.1 * grad
            losses.append(loss.item())
            if len(losses) == 4:
                right = twin(data.validation.x).argmax(1) == data.validation.y
                accuracies.append(right.double().mean().item())
    assert history.losses == pytest.approx(losses, rel=1e-5)
    assert history.validation == pytest.approx(accuracies)


def test_an_epoch_sees_every_training_example_once_and_validation_follows_each():
    seen = []

    class Look(nn.Linear):
        def forward(self, x):
            if self.training:
                seen.append(x)
            return super().forward(x)

    data, model = dataset(), Look(4, 3)
    history = train.fit(model, data, steps=8, optimizer=torch.optim.SGD(model.parameters(), 0.1), batch_size=16)
    assert [len(batch) for batch in seen] == [16, 16, 16, 2] * 2
    for epoch in (seen[:4], seen[4:]):
        assert {tuple(row) for row in torch.cat(epoch).tolist()} == {tuple(row) for row in data.train.x.tolist()}
    assert not torch.equal(torch.cat(seen[:4]), torch.cat(seen[4:]))
    assert len(history.losses) == 8
    assert len(history.validation) == 2


def test_nothing_is_validated_where_nobody_watches():
    assert fitted(watch=False)[0].validation == []
    assert fitted(watch=False)[0].losses == fitted()[0].losses


def test_what_comes_after_backward_sees_the_gradients_of_its_step_before_the_step():
    model, calls = models.mlp([4, 3]), []
    before = copy.deepcopy(model)

    def look(step):
        calls.append(step)
        assert all(p.grad is not None for p in model.parameters())
        if step == 0:
            assert torch.equal(model[0].weight, before[0].weight)
        for parameter in model.parameters():
            parameter.grad.zero_()

    train.fit(model, dataset(), steps=3, optimizer=torch.optim.SGD(model.parameters(), 0.1), after_backward=look)
    assert calls == [0, 1, 2]
    assert torch.equal(model[0].weight, before[0].weight)


def test_a_rate_multiplies_the_learning_rate_of_its_step_alone():
    seen = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(self.param_groups[0]["lr"])
            return super().step(closure)

    model = models.mlp([4, 8, 3])
    optimizer = Watched(model.parameters(), lr=0.1)
    train.fit(model, dataset(), steps=4, optimizer=optimizer, rate=lambda step: 1 - step / 4)
    assert seen == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_loss_of_ones_own_is_minimised_and_recorded():
    def matched(scores, y, x):
        assert len(scores) == len(y) == len(x)
        return (scores - 1).square().mean()

    history, model = fitted(steps=60, loss=matched)
    assert history.losses[-1] < 0.1 * history.losses[0]
    assert (model(dataset().train.x) - 1).square().mean().item() < 0.1 * history.losses[0]


def test_no_progress_bar_is_drawn_under_a_test(capsys, monkeypatch):
    fitted()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    for name in ("PYTEST_CURRENT_TEST", "GRADPRUNE_QUIET", "CI"):
        monkeypatch.delenv(name, raising=False)
    fitted()
    assert "training" in capsys.readouterr().err


@pytest.mark.parametrize(("steps", "batch_size"), [(0, 1), (-1, 1), (1, 0)])
def test_fewer_than_one_step_or_example_is_refused(steps, batch_size):
    model = models.mlp([4, 3])
    with pytest.raises(ValueError, match=f"must be at least 1, not {steps} and {batch_size}"):
        train.fit(
            model,
            dataset(),
            steps=steps,
            batch_size=batch_size,
            optimizer=torch.optim.SGD(model.parameters(), 0.1),
        )


def test_accuracy_is_the_share_of_the_largest_scores_that_are_right_in_evaluation_mode():
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.9999))
    split = Split(torch.eye(4), torch.tensor([0, 1, 2, 0]))
    assert train.accuracy(model, split) == 0.75


def test_accuracy_leaves_every_module_in_its_mode_also_where_the_model_fails():
    model = nn.Sequential(nn.BatchNorm1d(4).eval(), nn.Linear(4, 3))
    train.accuracy(model, dataset().validation)
    assert [module.training for module in model.modules()] == [True, False, True]
    with pytest.raises(RuntimeError):
        train.accuracy(model, Split(torch.zeros(2, 9), torch.zeros(2, dtype=torch.int64)))
    assert [module.training for module in model.modules()] == [True, False, True]
    assert model[0].running_mean.abs().sum() == 0


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_an_interval_is_that_of_scipys_t_distribution(confidence):
    values = [0.91, 0.93, 0.88, 0.94, 0.9]
    mean, low, high = train.interval(values, confidence)
    wanted = stats.ttest_1samp(values, 0).confidence_interval(confidence)
    assert mean == pytest.approx(np.mean(values))
    assert (low, high) == pytest.approx((wanted.low, wanted.high))


def test_an_interval_of_five_seeds_is_the_textbooks():
    mean, low, high = train.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776 * (2.5 / 5) ** 0.5  # t of 4 degrees of freedom at 97.5 %
    assert mean == 3
    assert (high - 3, 3 - low) == pytest.approx((half, half), rel=1e-3)


def test_an_interval_needs_two_values():
    for values in ([], [1.0]):
        with pytest.raises(ValueError, match=f"at least two values, not {len(values)}"):
            train.interval(values)


def fixed(rate, seed):
    """A "network" that gives every example the same class: the rate, rounded; data whose parts differ."""
    model = nn.Linear(1, 3)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(functional.one_hot(torch.tensor(round(rate)), 3))

    def part(labels):
        return Split(torch.zeros(len(labels), 1), torch.tensor(labels))

    return model, Dataset("fixed", part([0]), part([1, 1, 1, 2]), part([1, 2, 2, seed % 3]), 3)


def test_a_rate_is_chosen_on_validation_and_reported_on_test_data():
    found = train.tune_and_report(fixed, [0.0, 1.0, 2.0], tuning_seeds=[7], seeds=[0, 1])
    assert found["learning_rate"] == 1.0
    assert found["tuning"] == [[0.0, 0.0], [1.0, 0.75], [2.0, 0.25]]
    assert found["accuracy"] == [0.25, 0.5]


def test_of_equal_rates_the_first_is_taken():
    assert train.tune_and_report(fixed, [1.2, 1.0], tuning_seeds=[7], seeds=[0])["learning_rate"] == 1.2


def test_a_seed_cannot_be_chosen_on_and_reported_on():
    with pytest.raises(ValueError, match=r"seeds \[3\] are to be tuned and reported on"):
        train.tune_and_report(fixed, [1.0], tuning_seeds=[2, 3], seeds=[3, 4])
    with pytest.raises(ValueError, match="at least one rate"):
        train.tune_and_report(fixed, [], tuning_seeds=[2], seeds=[3])


def test_the_rate_rises_on_a_line_and_falls_on_half_a_cosine_to_0():
    rate = train.cosine(100, warmup=10)
    assert [rate(0), rate(4)] == pytest.approx([0.1, 0.5], rel=0.01)
    assert rate(50) == pytest.approx(0.5)
    assert rate(100) == pytest.approx(0)
    assert all(rate(step) > rate(step + 1) for step in range(10, 99))


def test_a_perceptron_starts_by_its_seed_and_sees_its_batches_by_their_order():
    def weights(**how):
        return torch.nn.utils.parameters_to_vector(train.perceptron(dataset(), [4, 8, 3], steps=12, **how).parameters())

    torch.manual_seed(1)
    by_hand = models.mlp([4, 8, 3])
    sgd = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    train.fit(by_hand, dataset(), steps=12, optimizer=sgd, seed=2)
    assert torch.equal(weights(seed=1, order=2), torch.nn.utils.parameters_to_vector(by_hand.parameters()))
    assert torch.equal(weights(seed=1), weights(seed=1, order=1))
    assert not torch.equal(weights(seed=1), weights(seed=1, order=2))
    assert not torch.equal(weights(seed=1, order=2), weights(seed=2, order=2))


def test_lots_of_a_seed_are_not_the_numbers_that_its_first_weights_were_made_of():
    def correlation(generator: torch.Generator) -> float:
        torch.manual_seed(3)
        model = nn.Linear(100, 100)
        first = model.weight.detach().flatten().clone()
        masks = gp.prune(model, partial(gp.random, generator=generator), sparsity=0.8)
        return torch.corrcoef(torch.stack([masks["weight"].flatten().float(), first]))[0, 1].item()

    assert correlation(torch.Generator().manual_seed(3)) > 0.6
    assert abs(correlation(train.lots(3))) < 0.05
    assert torch.equal(torch.rand(5, generator=train.lots(3)), torch.rand(5, generator=train.lots(3)))
