"""Does the start page's network lose its weights and train again as gradprune and torch would have it?"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import page_batches
from page import facts, opened, set_slider, settled, write_page
from playwright.sync_api import Browser, Locator
from torch import nn
from torch.nn import functional

import gradprune as gp
from gradprune import lab
from gradprune.lab.live import Start, perceptron
from gradprune.lab.live.start import BATCH, EPOCHS, SGD


@pytest.fixture
def root(browser: Browser, pages: dict[str, Path]) -> Iterator[Locator]:
    with opened(browser, pages["start"]) as root:
        yield root


def train_again(root: Locator) -> dict[str, str]:
    return settled(root, lambda: root.get_by_role("button", name="Train again").click())


def numbers(root: Locator) -> np.ndarray:
    return np.array(root.evaluate("(root) => [...root.numbers()]"), dtype=np.float32)


def trained_on(sparsity: float, steps: int) -> tuple[nn.Module, gp.Masks]:
    """The network pruned, and trained again by torch on the page's batches."""
    model, data = perceptron.trained(), perceptron.digits()
    masks = gp.prune(model, sparsity=sparsity)
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    masks.hold(optimizer)
    for rows in page_batches(0, len(data.train), BATCH, steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(data.train.x[rows]), data.train.y[rows]).backward()
        optimizer.step()
    return model, masks


def test_page_and_gradprune_keep_the_same_weights_and_read_as_many_digits(root: Locator) -> None:
    for sparsity in (0.1, 0.25, 0.33, 0.5, 0.66, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99, 0.0):
        seen = set_slider(root, "weights removed", round(100 * sparsity))
        figure = Start(sparsity=sparsity)
        network, masks = figure.network, figure.masks
        masks.apply_(network)
        assert int(seen["kept"]) == sum(int(mask.sum()) for mask in masks.values())
        expected = lab.train.accuracy(network, perceptron.digits().test)
        assert float(seen["accuracy"]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.95])
def test_training_again_takes_torchs_steps_and_pruned_weights_stay_zero(root: Locator, sparsity: float) -> None:
    pruned = set_slider(root, "weights removed", round(100 * sparsity))
    seen = train_again(root)
    steps = EPOCHS * -(-len(perceptron.digits().train) // BATCH)
    assert int(seen["steps"]) == steps
    model, masks = trained_on(sparsity, steps)
    expected = nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
    np.testing.assert_allclose(numbers(root), expected, rtol=1e-3, atol=1e-4)
    accuracy = lab.train.accuracy(model, perceptron.digits().test)
    assert float(seen["accuracy"]) == pytest.approx(accuracy, abs=1.5 / 359)  # one digit may tip over
    assert float(seen["accuracy"]) >= float(pruned["accuracy"])
    weights = sum(mask.numel() for mask in masks.values())
    assert (numbers(root) == 0).sum() == weights - int(seen["kept"])
    words = root.locator(".gp-live-words").inner_text()
    assert f"{100 * float(pruned['accuracy']):.1f} % before it was trained again" in words


def test_after_training_fewer_weights_are_taken_from_what_was_trained_and_more_from_the_first(root: Locator) -> None:
    set_slider(root, "weights removed", 80)
    train_again(root)
    trained = numbers(root)
    set_slider(root, "weights removed", 90)
    further = numbers(root)
    kept = further != 0
    assert (further[kept] == trained[kept]).all()
    back = set_slider(root, "weights removed", 50)
    network, masks = perceptron.trained(), Start(sparsity=0.5).masks
    masks.apply_(network)
    expected = lab.train.accuracy(network, perceptron.digits().test)
    assert float(back["accuracy"]) == pytest.approx(expected, abs=1e-6)


def test_every_control_works_by_keyboard_and_reset_restores_the_first(root: Locator) -> None:
    first, keyboard = facts(root), root.page.keyboard
    keyboard.press("Tab")
    assert settled(root, lambda: keyboard.press("End"))["sparsity"] == "0.99"
    keyboard.press("Tab")
    assert int(settled(root, lambda: keyboard.press("Enter"))["steps"]) > 0
    keyboard.press("Tab")
    last = settled(root, lambda: keyboard.press("Enter"))
    for name in ("sparsity", "accuracy", "kept", "digit", "steps"):
        assert last[name] == first[name]
    for digit in range(10):
        keyboard.press("Tab")
        settled(root, lambda: keyboard.press("Enter"))
        assert root.locator(":focus").get_attribute("aria-pressed") == "true"
        assert root.locator(":focus").inner_text() == str(digit)


def test_each_example_and_what_a_reader_draws_gets_the_networks_answer(root: Locator) -> None:
    x, y = perceptron.digits().test.x, perceptron.digits().test.y
    for digit in range(10):
        seen = settled(root, root.get_by_role("button", name=f"show a {digit}").click)
        example = x[int((y == digit).nonzero()[0])]
        assert int(seen["digit"]) == int(perceptron.trained()(example).argmax())
    box = root.locator("canvas.gp-live-pad").bounding_box()
    assert box is not None
    mouse = root.page.mouse
    mouse.move(box["x"] + box["width"] / 2, box["y"] + 8)
    mouse.down()
    mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] - 8, steps=20)
    mouse.up()
    root.page.wait_for_function("(root) => root.dataset.digit === '1'", arg=root.element_handle())
    assert root.locator("canvas.gp-live-pad").get_attribute("aria-label") == "what you drew, 8 by 8 pixels"


def draw(root: Locator, *corners: tuple[float, float]) -> None:
    """A stroke over the pad, its corners as shares of its width and height."""
    box = root.locator("canvas.gp-live-pad").bounding_box()
    assert box is not None
    places = [(box["x"] + across * box["width"], box["y"] + down * box["height"]) for across, down in corners]
    root.page.mouse.move(*places[0])
    root.page.mouse.down()
    for place in places[1:]:
        root.page.mouse.move(*place, steps=10)
    root.page.mouse.up()


def ink(root: Locator) -> list[int]:
    pixels = "(c) => [...c.getContext('2d').getImageData(0, 0, 8, 8).data].filter((_, i) => i % 4 === 3)"
    found: list[int] = root.locator("canvas.gp-live-pad").evaluate(pixels)
    return found


def test_strokes_add_up_until_the_pad_is_cleared_or_a_digit_picked(root: Locator) -> None:
    draw(root, (0.3, 0.1), (0.3, 0.5))
    first = ink(root)
    draw(root, (0.7, 0.1), (0.7, 0.9))
    both = ink(root)
    assert all(after >= before for before, after in zip(first, both, strict=True))
    assert sum(both) > 1.5 * sum(first)
    assert "What you drew is read as a" in root.locator(".gp-live-words").inner_text()
    settled(root, root.get_by_role("button", name="Clear").click)
    assert not any(ink(root))
    settled(root, root.get_by_role("button", name="show a 3").click)
    draw(root, (0.3, 0.1), (0.3, 0.5))
    assert ink(root) == first


def test_the_first_digit_is_lost_with_nine_tenths_of_the_weights_and_comes_back(root: Locator) -> None:
    assert facts(root)["digit"] == "8"
    assert set_slider(root, "weights removed", 90)["digit"] != "8"
    assert ", wrongly" in root.locator(".gp-live-words").inner_text()
    assert train_again(root)["digit"] == "8"
    assert ", wrongly" not in root.locator(".gp-live-words").inner_text()


def test_the_words_say_which_network_is_shown(root: Locator) -> None:
    set_slider(root, "weights removed", 80)
    train_again(root)
    set_slider(root, "weights removed", 95)
    assert "trained again at 80.0 %, and has lost more since" in root.locator(".gp-live-words").inner_text()
    set_slider(root, "weights removed", 80)
    assert "before it was trained again" in root.locator(".gp-live-words").inner_text()
    set_slider(root, "weights removed", 70)
    assert "trained again" not in root.locator(".gp-live-words").inner_text()


def test_there_is_nothing_to_train_while_no_weight_is_gone(root: Locator) -> None:
    assert root.get_by_role("button", name="Train again").is_disabled()
    set_slider(root, "weights removed", 10)
    assert root.get_by_role("button", name="Train again").is_enabled()


def test_without_reduced_motion_the_steps_are_seen(browser: Browser, tmp_path: Path) -> None:
    path = write_page(Start(sparsity=0.9), tmp_path / "page.html")
    with opened(browser, path, reduced_motion="no-preference") as root:
        before = facts(root)
        root.get_by_role("button", name="Train again").click()
        root.page.wait_for_function("(root) => root.dataset.running === 'true'", arg=root.element_handle())
        seen = set()
        while (now := facts(root))["running"] == "true":
            seen.add(now["steps"])
        assert len(seen) > 3
        assert float(facts(root)["accuracy"]) > float(before["accuracy"])
