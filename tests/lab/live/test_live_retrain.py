"""Do the page's two networks lose the weights that gradprune takes, and train as torch has it?"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import page_batches
from page import facts, heard, opened, set_slider, settled, words
from playwright.sync_api import Browser, Locator
from torch import nn
from torch.nn import functional

import gradprune as gp
from gradprune import lab
from gradprune.lab.live import Retrain, perceptron
from gradprune.lab.live.retrain import BATCH, EARLY, SGD, STEPS, comparison


@pytest.fixture
def root(browser: Browser, pages: dict[str, Path]) -> Iterator[Locator]:
    with opened(browser, pages["retrain"]) as root:
        yield root


def train(root: Locator) -> dict[str, str]:
    return settled(root, lambda: root.get_by_role("button", name="Train").click())


def numbers(root: Locator, which: str) -> np.ndarray:
    return np.array(root.evaluate(f"(root) => [...root.numbers().{which}]"), dtype=np.float32)


def choose(root: Locator, sparsity: float, rounds: int, after: str) -> dict[str, str]:
    seen = facts(root)
    if float(seen["sparsity"]) != sparsity:
        seen = set_slider(root, "weights removed in the end", 100 * sparsity)
    if int(seen["rounds"]) != rounds:
        seen = set_slider(root, "rounds of the second network", rounds)
    radio = root.locator(f"input[value='{after}']")
    return seen if radio.is_checked() else settled(root, radio.check)


def pruned_in_rounds(
    sparsity: float, rounds: int, each: int, after: str, until: int | None = None
) -> tuple[nn.Module, gp.Masks]:
    """The network by gradprune and torch, on the page's batches; after all steps, or the first `until`."""
    model, data = perceptron.trained(), perceptron.digits()
    batches = page_batches(0, len(data.train), BATCH, rounds * each)[:until]
    for number in range(-(-len(batches) // each)):
        gone = 1 - (1 - sparsity) ** ((number + 1) / rounds)
        masks = gp.prune(model, sparsity=gone, min_keep=1)
        if after == "rewinding":
            model.load_state_dict(perceptron.trained(steps=EARLY).state_dict())
            masks.apply_(model)
        optimizer = torch.optim.SGD(model.parameters(), **SGD)
        masks.hold(optimizer, model)
        for rows in batches[number * each : (number + 1) * each]:
            optimizer.zero_grad()
            functional.cross_entropy(model(data.train.x[rows]), data.train.y[rows]).backward()
            optimizer.step()
    return model, masks


SETTINGS = [
    (sparsity, rounds, after)
    for sparsity, rounds in [(0.5, 2), (0.8, 3), (0.9, 5), (0.95, 5), (0.98, 10), (0.99, 7)]
    for after in ("going on", "rewinding")
]


def test_the_first_pruning_of_both_is_gradprunes(root: Locator) -> None:
    for sparsity, rounds, after in SETTINGS:
        seen = choose(root, sparsity, rounds, after)
        for which, kept, gone in (
            ("once", "keptOnce", sparsity),
            ("many", "keptMany", 1 - (1 - sparsity) ** (1 / rounds)),
        ):
            model = perceptron.trained()
            masks = gp.prune(model, sparsity=gone, min_keep=1)
            if after == "rewinding":
                model.load_state_dict(perceptron.trained(steps=EARLY).state_dict())
                masks.apply_(model)
            expected = nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
            assert (numbers(root, which) == expected).all()
            assert int(seen[kept]) == sum(int(mask.sum()) for mask in masks.values())
            accuracy = lab.train.accuracy(model, perceptron.digits().test)
            assert float(seen[which]) == pytest.approx(accuracy, abs=1e-6)


def test_one_step_after_the_first_pruning_is_torchs(root: Locator) -> None:
    for sparsity, rounds, after in SETTINGS:
        choose(root, sparsity, rounds, after)
        before = {which: numbers(root, which) for which in ("once", "many")}
        root.evaluate("(root) => root.advance(1)")
        each = round(STEPS / rounds)
        for which, times, length in (("once", 1, rounds * each), ("many", rounds, each)):
            model, _ = pruned_in_rounds(sparsity, times, length, after, until=1)
            stepped = nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
            largest = np.abs(stepped - before[which]).max()
            assert largest > 1e-4  # so that a step left out is seen
            # A hundred-thousandth of the step, and what single precision rounds of a weight.
            np.testing.assert_allclose(numbers(root, which), stepped, rtol=2.5e-7, atol=1e-5 * largest)


@pytest.mark.parametrize("after", ["going on", "rewinding"])
def test_the_first_step_after_the_second_pruning_has_no_momentum_from_before(root: Locator, after: str) -> None:
    choose(root, 0.9, 10, after)
    each = STEPS // 10
    root.evaluate("(root, steps) => root.advance(steps)", each + 1)
    model, masks = pruned_in_rounds(0.9, 10, each, after, until=each + 1)
    assert masks.sparsity == pytest.approx(1 - 0.1**0.2, abs=1e-3)
    expected = nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
    np.testing.assert_allclose(numbers(root, "many"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("sparsity", "rounds", "after"), [(0.9, 5, "going on"), (0.95, 4, "rewinding")])
def test_both_networks_train_as_torch_has_it(root: Locator, sparsity: float, rounds: int, after: str) -> None:
    choose(root, sparsity, rounds, after)
    seen = train(root)
    each = round(STEPS / rounds)
    assert int(seen["steps"]) == rounds * each
    once, masks = pruned_in_rounds(sparsity, 1, rounds * each, after)
    expected = nn.utils.parameters_to_vector(once.parameters()).detach().numpy()
    np.testing.assert_allclose(numbers(root, "once"), expected, rtol=1e-3, atol=1e-4)
    many, _ = pruned_in_rounds(sparsity, rounds, each, after)
    # A weight near the threshold of a later round may stay in one and go in the other: single precision.
    read = lab.train.accuracy(many, perceptron.digits().test)
    assert float(seen["many"]) == pytest.approx(read, abs=4 / 359)
    assert int(seen["keptMany"]) == int(seen["keptOnce"]) == sum(int(mask.sum()) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    assert (numbers(root, "many") == 0).sum() == total - int(seen["keptMany"])


@pytest.mark.parametrize(("sparsity", "after"), [(0.95, "going on"), (0.98, "going on"), (0.95, "rewinding")])
def test_what_single_precision_changes_is_less_than_what_another_order_of_the_batches_does(
    root: Locator, sparsity: float, after: str
) -> None:
    choose(root, sparsity, 5, after)
    seen = train(root)
    each = STEPS // 5
    for which, rounds, orders in zip(("once", "many"), (1, 5), comparison(sparsity, 5, after), strict=True):
        model, _ = pruned_in_rounds(sparsity, rounds, 5 * each // rounds, after)
        change = abs(float(seen[which]) - lab.train.accuracy(model, perceptron.digits().test))
        assert change < max(orders) - min(orders)


def test_every_control_works_by_keyboard_and_reset_restores_the_first(root: Locator) -> None:
    first, keyboard = facts(root), root.page.keyboard
    keyboard.press("Tab")
    assert settled(root, lambda: keyboard.press("End"))["sparsity"] == "0.99"
    keyboard.press("Tab")
    assert settled(root, lambda: keyboard.press("ArrowRight"))["rounds"] == "6"
    keyboard.press("Tab")
    assert settled(root, lambda: keyboard.press("ArrowDown"))["after"] == "rewinding"
    keyboard.press("Tab")
    assert settled(root, lambda: keyboard.press("Enter"))["steps"] == "180"
    assert root.get_by_role("button", name="Train").is_disabled()
    root.get_by_role("button", name="Reset").focus()
    last = settled(root, lambda: keyboard.press("Enter"))
    for name in ("sparsity", "rounds", "after", "steps", "once", "many", "keptOnce", "keptMany"):
        assert last[name] == first[name]


def test_a_running_training_can_be_paused_and_goes_on(browser: Browser, pages: dict[str, Path]) -> None:
    path = pages["retrain"]
    with opened(browser, path, reduced_motion="no-preference") as root:
        root.get_by_role("button", name="Train").click()
        root.page.wait_for_function("(root) => Number(root.dataset.steps) > 3", arg=root.element_handle())
        paused = settled(root, lambda: root.get_by_role("button", name="Pause").click())
        assert 3 < int(paused["steps"]) < STEPS
        root.get_by_role("button", name="Train").click()
        root.page.wait_for_function(f"(root) => root.dataset.steps === '{STEPS}'", arg=root.element_handle())


def test_the_sentence_says_what_both_read(root: Locator) -> None:
    seen = train(root)
    said = words(root)
    assert said.startswith("After all 180 steps, the network pruned at once")
    for which in ("once", "many"):
        assert f"reads {100 * float(seen[which]):.1f} %" in said


def test_without_a_page_the_masks_are_those_of_one_shot() -> None:
    figure = Retrain(sparsity=0.9)
    expected = gp.prune(figure.network, sparsity=0.9)
    assert all(torch.equal(mask, expected[name]) for name, mask in figure.masks.items())


def test_what_python_goes_on_from_is_the_pages_second_network_at_that_setting(root: Locator) -> None:
    choose(root, 0.95, 4, "rewinding")
    settings = {"sparsity": 0.95, "rounds": 4, "after": "rewinding"}
    for change in (lambda: facts(root), lambda: train(root)):
        seen = change()
        figure = heard(root, Retrain(**settings))
        network, masks = figure.network, figure.masks
        masks.apply_(network)
        found = nn.utils.parameters_to_vector(network.parameters()).detach().numpy()
        assert (found == numbers(root, "many")).all()
        assert sum(int(mask.sum()) for mask in masks.values()) == int(seen["keptMany"])
    for other in ({"sparsity": 0.6}, {"rounds": 5}, {"after": "going on"}):
        figure = heard(root, Retrain(**settings | other))
        alone = Retrain(**settings | other)
        assert all(torch.equal(mask, alone.masks[name]) for name, mask in figure.masks.items())
        pairs = zip(figure.network.parameters(), perceptron.trained().parameters(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
