"""Are the page's deep networks, their gradients and their predicted slope those of torch and of chapter 1's formula?"""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import page_batches
from page import facts, opened, set_slider, settled, words
from playwright.sync_api import Browser, Locator
from torch import nn
from torch.nn import functional

import gradprune as gp
from gradprune import lab
from gradprune.lab.live import Depth, perceptron

SETTINGS = [
    ("sigmoid", 20, 1.0),
    ("sigmoid", 5, 3.0),
    ("tanh", 1, 1.0),
    ("tanh", 20, 1.0),
    ("tanh", 60, 0.8),
    ("tanh", 40, 1.2),  # not larger: so deep, what rounding changed grows from layer to layer, in torch too
    ("relu", 20, 1.4),
    ("relu", 60, 1.4),
    ("relu", 10, 0.5),
    ("linear", 30, 1.0),
    ("linear", 10, 2.0),
    ("linear", 60, 0.2),
]


@pytest.fixture
def root(browser: Browser, pages: dict[str, Path]) -> Iterator[Locator]:
    with opened(browser, pages["depth"]) as root:
        yield root


def choose(root: Locator, activation: str, depth: int, scale: float) -> dict[str, str]:
    seen = facts(root)
    if int(seen["depth"]) != depth:
        seen = set_slider(root, "hidden layers", depth)
    if float(seen["scale"]) != scale:
        seen = set_slider(root, "weight scale", scale)
    radio = root.locator(f"input[value={activation}]")
    return seen if radio.is_checked() else settled(root, radio.check)


def train(root: Locator) -> dict[str, str]:
    return settled(root, lambda: root.get_by_role("button", name="Train").click())


def panel(root: Locator, number: int) -> Locator:
    return root.locator(".gp-live-chart").nth(number)


def numbers(root: Locator) -> np.ndarray:
    return np.array(root.evaluate("(root) => [...root.numbers()]"), dtype=np.float32)


def test_network_gradients_and_prediction_are_torchs_and_the_formulas(root: Locator) -> None:
    for activation, depth, scale in SETTINGS:
        seen = choose(root, activation, depth, scale)
        figure = Depth(activation=activation, depth=depth, scale=scale)
        expected = nn.utils.parameters_to_vector(figure.network.parameters()).detach().numpy()
        np.testing.assert_allclose(numbers(root), expected, rtol=2e-7)
        norms = root.evaluate("(root) => root.gradients()")
        exact = np.array(figure.gradient_norms)
        inside = exact > 1e-30  # single precision ends at 1e-38, and its digits before
        np.testing.assert_allclose(np.array(norms)[inside], exact[inside], rtol=1e-5)
        predicted = math.sqrt(math.prod(figure.factors[:-1])) * exact[-2] / exact[-1]
        assert float(seen["predicted"]) == pytest.approx(predicted, rel=2e-3)


def test_beyond_single_precision_the_page_and_torch_lose_the_same_layers(root: Locator) -> None:
    choose(root, "sigmoid", 60, 0.2)
    norms = np.array(root.evaluate("(root) => root.gradients()"))
    exact = np.array(Depth(activation="sigmoid", depth=60, scale=0.2).gradient_norms)
    assert (exact == 0).sum() > 20
    assert ((norms == 0) == (exact == 0)).all()
    assert facts(root)["ratio"] == "0"
    assert panel(root, 0).get_by_text(f"{(exact == 0).sum()} layers below the").is_visible()
    assert "the gradient is 0: what is left is below single precision's smallest number" in words(root)


def torch_trained(figure: Depth, steps: int, seed: int = 0) -> nn.Sequential:
    """The figure's network after torch's steps on the page's batches."""
    model, data = figure.network, perceptron.digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for rows in page_batches(seed, len(data.train), 64, steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(data.train.x[rows]), data.train.y[rows]).backward()
        optimizer.step()
    return model


def vector(model: nn.Module) -> np.ndarray:
    flat: np.ndarray = nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
    return flat


def test_one_training_step_is_torchs(root: Locator) -> None:
    for activation, depth, scale in SETTINGS:
        choose(root, activation, depth, scale)
        figure = Depth(activation=activation, depth=depth, scale=scale)
        before = numbers(root)
        root.evaluate("(root) => root.train(1)")
        stepped = vector(torch_trained(figure, 1))
        largest = np.abs(stepped - before).max()
        assert largest > 1e-4  # so that a step left out is seen
        # A hundred-thousandth of the step, and what single precision rounds of a weight.
        np.testing.assert_allclose(numbers(root), stepped, rtol=2.5e-7, atol=1e-5 * largest)
        settled(root, lambda: root.get_by_role("button", name="Reset").click())


@pytest.mark.parametrize(("activation", "depth"), [("tanh", 5), ("tanh", 20), ("sigmoid", 20)])
def test_training_takes_torchs_steps(root: Locator, activation: str, depth: int) -> None:
    choose(root, activation, depth, 1.0)
    seen = train(root)
    figure = Depth(activation=activation, depth=depth)
    model, first = torch_trained(figure, 200), figure.network[0].weight.detach()
    assert int(seen["steps"]) == 200
    moved = float((model[0].weight.detach() - first).norm() / first.norm())
    assert float(seen["moved"]) == pytest.approx(moved, rel=1e-4)
    assert float(seen["accuracy"]) == pytest.approx(lab.train.accuracy(model, perceptron.digits().test), abs=1.5 / 359)


@pytest.mark.parametrize(("activation", "depth"), [("tanh", 5), ("tanh", 20), ("relu", 5)])
def test_what_single_precision_changes_is_less_than_what_another_order_of_the_batches_does(
    root: Locator, activation: str, depth: int
) -> None:
    scale = 1.4 if activation == "relu" else 1.0
    choose(root, activation, depth, scale)
    seen = train(root)
    figure = Depth(activation=activation, depth=depth, scale=scale)
    first = figure.network[0].weight.detach()

    def measured(seed: int) -> tuple[float, float]:
        model = torch_trained(figure, 200, seed)
        moved = float((model[0].weight.detach() - first).norm() / first.norm())
        return moved, lab.train.accuracy(model, perceptron.digits().test)

    page = float(seen["moved"]), float(seen["accuracy"])
    same, *others = map(measured, range(6))
    for at in range(2):
        spread = [other[at] for other in others]
        assert abs(page[at] - same[at]) < max(spread) - min(spread)


def test_relu_takes_torchs_steps_before_rounding_parts_them(root: Locator) -> None:
    # In 200 steps at a rate this high for relu, torch in single and in double precision come apart too.
    choose(root, "relu", 10, 1.4)
    root.evaluate("(root) => root.train(10)")
    expected = vector(torch_trained(Depth(activation="relu", depth=10, scale=1.4), 10))
    np.testing.assert_allclose(numbers(root), expected, rtol=1e-4, atol=1e-4)


def test_a_first_layer_without_gradient_does_not_move_and_the_sentence_says_so(root: Locator) -> None:
    assert panel(root, 1).get_by_text("press Train").is_visible()
    seen = train(root)
    assert float(seen["ratio"]) < 1e-11
    assert float(seen["moved"]) == 0
    assert "After 200 steps layer 1 has moved by 0.0 % of its norm" in words(root)
    assert f"{100 * float(seen['accuracy']):.1f} % of the test digits" in words(root)
    assert re.search(r"not moved: \d+ layers", panel(root, 1).inner_text())


def test_training_moves_the_gradient_and_not_what_the_formula_said_before(root: Locator) -> None:
    line = panel(root, 0).locator("path.gp-predicted")
    fresh = choose(root, "tanh", 5, 1.0)
    drawn = line.get_attribute("d")
    trained = train(root)
    assert abs(float(trained["ratio"]) / float(fresh["ratio"]) - 1) > 0.1
    assert trained["predicted"] == fresh["predicted"]
    assert line.get_attribute("d") == drawn


def test_a_network_that_explodes_is_said_to(root: Locator) -> None:
    choose(root, "linear", 60, 3.0)
    train(root)
    assert "the gradient is beyond single precision's largest number" in words(root)
    assert "the loss is no number any more" in words(root)
    assert "beyond the largest number" in panel(root, 0).inner_text()
    for number in (1, 2):
        assert panel(root, number).get_by_text("no number any more").is_visible()
    assert root.get_by_role("button", name="Train").is_disabled()


def test_every_control_works_by_keyboard_and_reset_restores_the_first(root: Locator) -> None:
    first, keyboard = facts(root), root.page.keyboard
    keyboard.press("Tab")
    assert settled(root, lambda: keyboard.press("Home"))["depth"] == "1"
    keyboard.press("Tab")
    assert settled(root, lambda: keyboard.press("ArrowRight"))["scale"] == "1.1"
    keyboard.press("Tab")
    assert settled(root, lambda: keyboard.press("ArrowDown"))["activation"] == "tanh"
    keyboard.press("Tab")
    assert settled(root, lambda: keyboard.press("Enter"))["steps"] == "200"
    root.get_by_role("button", name="Reset").focus()
    last = settled(root, lambda: keyboard.press("Enter"))
    for name in ("depth", "activation", "scale", "ratio", "predicted", "steps", "moved", "accuracy"):
        assert last[name] == first[name]


def test_the_network_goes_on_without_a_page() -> None:
    figure = Depth(activation="relu", depth=3)
    network, data = figure.network, perceptron.digits()
    norms = gp.gradient_norms(network, functional.cross_entropy(network(data.train.x), data.train.y))
    assert len([name for name in norms if name.endswith("weight")]) == 4
    assert len(figure.gradient_norms) == len(figure.factors) + 1 == 4
