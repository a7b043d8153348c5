"""Does the start page's network lose its weights and train again as gradprune and torch would have it?"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import page_batches
from page import facts, heard, opened, set_slider, settled, words, write_page
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


def trained_on(sparsity: float, steps: int, seed: int = 0) -> tuple[nn.Module, gp.Masks]:
    """The network pruned, and trained again by torch on the page's batches."""
    model, data = perceptron.trained(), perceptron.digits()
    masks = gp.prune(model, sparsity=sparsity)
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    masks.hold(optimizer)
    for rows in page_batches(seed, len(data.train), BATCH, steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(data.train.x[rows]), data.train.y[rows]).backward()
        optimizer.step()
    return model, masks


def test_page_and_gradprune_keep_the_same_weights_and_read_as_many_digits(root: Locator) -> None:
    for sparsity in (0.1, 0.25, 0.33, 0.5, 0.66, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99, 0.0):
        seen = set_slider(root, "weights removed", round(100 * sparsity))
        alone = Start(sparsity=sparsity)
        network, masks = alone.network, alone.masks
        masks.apply_(network)
        assert int(seen["kept"]) == sum(int(mask.sum()) for mask in masks.values())
        expected = lab.train.accuracy(network, perceptron.digits().test)
        assert float(seen["accuracy"]) == pytest.approx(expected, abs=1e-6)


def test_one_step_of_training_again_is_torchs(root: Locator) -> None:
    for sparsity in (0.1, 0.25, 0.33, 0.5, 0.66, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99):
        set_slider(root, "weights removed", round(100 * sparsity))
        before = numbers(root)
        root.evaluate("(root) => root.train(1)")
        model, _ = trained_on(sparsity, 1)
        stepped = nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
        largest = np.abs(stepped - before).max()
        assert largest > 1e-4  # so that a step left out is seen
        # A hundred-thousandth of the step, and what single precision rounds of a weight.
        np.testing.assert_allclose(numbers(root), stepped, rtol=2.5e-7, atol=1e-5 * largest)


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
    said = words(root)
    assert f"{100 * float(pruned['accuracy']):.1f} % before it was trained again" in said


def test_what_single_precision_changes_is_less_than_what_another_order_of_the_batches_does(root: Locator) -> None:
    steps, test = EPOCHS * -(-len(perceptron.digits().train) // BATCH), perceptron.digits().test
    for sparsity in (0.9, 0.95):
        set_slider(root, "weights removed", round(100 * sparsity))
        seen = train_again(root)
        set_slider(root, "weights removed", 10)  # so that the next one is taken from the first network
        same, *others = (lab.train.accuracy(trained_on(sparsity, steps, seed)[0], test) for seed in range(6))
        assert abs(float(seen["accuracy"]) - same) < max(others) - min(others)


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


def goes_on(root: Locator, sparsity: float) -> tuple[nn.Module, gp.Masks]:
    """The network that goes on in Python at a sparsity, with its masks applied."""
    figure = heard(root, Start(sparsity=sparsity))
    network, masks = figure.network, figure.masks
    masks.apply_(network)
    return network, masks


def test_what_python_goes_on_from_is_what_the_page_shows(root: Locator) -> None:
    for sparsity, trains in ((0.8, True), (0.9, False), (0.9, True), (0.95, False), (0.3, False)):
        seen = facts(root)
        if float(seen["sparsity"]) != sparsity:
            seen = set_slider(root, "weights removed", round(100 * sparsity))
        if trains:
            seen = train_again(root)
        network, masks = goes_on(root, sparsity)
        assert (nn.utils.parameters_to_vector(network.parameters()).detach().numpy() == numbers(root)).all()
        assert sum(int(mask.sum()) for mask in masks.values()) == int(seen["kept"])
        dense = gp.prune(perceptron.trained(), sparsity=sparsity)
        same = all(torch.equal(mask, dense[name]) for name, mask in masks.items())
        assert same == (sparsity in (0.3, 0.8))  # the others were chosen among what had been trained


def test_what_the_page_showed_at_another_setting_is_not_gone_on_from(root: Locator) -> None:
    set_slider(root, "weights removed", 80)
    train_again(root)
    network, masks = goes_on(root, 0.6)
    alone = Start(sparsity=0.6)
    assert all(torch.equal(mask, alone.masks[name]) for name, mask in masks.items())
    expected = alone.network
    alone.masks.apply_(expected)
    for found, wanted in zip(network.parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, wanted)


def test_a_training_that_is_interrupted_leaves_nothing_behind(browser: Browser, pages: dict[str, Path]) -> None:
    with opened(browser, pages["start"], reduced_motion="no-preference") as root:
        for sparsity in (0.5, 0.95):
            set_slider(root, "weights removed", 90)
            root.get_by_role("button", name="Train again").click()
            root.page.wait_for_function("(root) => root.dataset.steps > 3", arg=root.element_handle())
            assert facts(root)["running"] == "true"
            seen = set_slider(root, "weights removed", round(100 * sparsity))
            model = perceptron.trained()
            masks = gp.prune(model, sparsity=sparsity)
            expected = nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
            assert (numbers(root) == expected).all()
            assert int(seen["kept"]) == sum(int(mask.sum()) for mask in masks.values())
            assert "trained again" not in words(root)
            assert root.locator("circle.gp-corrected").count() == 0


def test_what_was_read_before_and_after_training_are_joined_points(root: Locator) -> None:
    before = float(set_slider(root, "weights removed", 90)["accuracy"])
    after = float(train_again(root)["accuracy"])
    curve = root.locator(".gp-live-chart").first
    heights = {}
    for name in ("pruned", "corrected"):
        dots = curve.locator(f"circle.gp-{name}[r='4']")
        heights[name] = float(dots.first.get_attribute("cy"))
    low, high = 192.0, 10.0  # of the axis, in the picture's units
    assert heights["pruned"] == pytest.approx(low + before * (high - low), abs=0.1)
    assert heights["corrected"] == pytest.approx(low + after * (high - low), abs=0.1)
    ends = [f"{heights[name]:.1f}" for name in ("pruned", "corrected")]
    paths = [line.get_attribute("d") for line in curve.locator("path.gp-corrected").all()]
    assert any(all(path.count(f" {end}") for end in ends) for path in paths)


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
    assert "What you drew is read as a" in words(root)
    settled(root, root.get_by_role("button", name="Clear").click)
    assert not any(ink(root))
    settled(root, root.get_by_role("button", name="show a 3").click)
    draw(root, (0.3, 0.1), (0.3, 0.5))
    assert ink(root) == first


def test_the_first_digit_is_lost_with_nine_tenths_of_the_weights_and_comes_back(root: Locator) -> None:
    assert facts(root)["digit"] == "8"
    assert set_slider(root, "weights removed", 90)["digit"] != "8"
    assert ", wrongly" in words(root)
    assert train_again(root)["digit"] == "8"
    assert ", wrongly" not in words(root)


def test_the_words_say_which_network_is_shown(root: Locator) -> None:
    set_slider(root, "weights removed", 80)
    train_again(root)
    set_slider(root, "weights removed", 95)
    assert "trained again at 80.0 %, and has lost more since" in words(root)
    set_slider(root, "weights removed", 80)
    assert "before it was trained again" in words(root)
    set_slider(root, "weights removed", 70)
    assert "trained again" not in words(root)


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
