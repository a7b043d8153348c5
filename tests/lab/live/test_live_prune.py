"""Does the page take away the weights that gradprune takes away, and read what is left as torch does?"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from page import facts, opened, set_slider, settled, words
from playwright.sync_api import Browser, Locator

from gradprune import lab
from gradprune.lab.live import Prune, perceptron

SETTINGS = [
    (ranking, scope, sparsity)
    for ranking, scope in [("smallest", "global"), ("smallest", "layer"), ("random", "global"), ("largest", "layer")]
    for sparsity in (0.0, 0.213, 0.5, 0.8, 0.95, 0.995)
]


@pytest.fixture
def root(browser: Browser, pages: dict[str, Path]) -> Iterator[Locator]:
    with opened(browser, pages["prune"]) as root:
        yield root


def choose(root: Locator, ranking: str, scope: str) -> None:
    for value in (ranking, scope):
        radio = root.locator(f"input[value={value}]")
        if not radio.is_checked():
            settled(root, radio.check)


def test_page_and_gradprune_keep_the_same_weights_and_read_as_many_digits(root: Locator) -> None:
    for ranking, scope, sparsity in SETTINGS:
        choose(root, ranking, scope)
        seen = facts(root)
        if float(seen["sparsity"]) != sparsity:
            seen = set_slider(root, "weights removed", 100 * sparsity)
        figure = Prune(ranking=ranking, scope=scope, sparsity=sparsity)
        masks, network = figure.masks, figure.network
        masks.apply_(network)
        assert int(seen["kept"]) == sum(int(mask.sum()) for mask in masks.values()), (ranking, scope, sparsity)
        expected = lab.train.accuracy(network, perceptron.digits().test)
        assert float(seen["accuracy"]) == pytest.approx(expected, abs=1e-6), (ranking, scope, sparsity)


def test_every_setting_is_reached_by_keyboard_and_reset_restores_the_first(root: Locator) -> None:
    first = facts(root)
    keyboard = root.page.keyboard
    keyboard.press("Tab")
    assert settled(root, lambda: keyboard.press("ArrowRight"))["sparsity"] == "0.001"
    assert settled(root, lambda: keyboard.press("End"))["sparsity"] == "0.995"
    keyboard.press("Tab")
    assert settled(root, lambda: keyboard.press("ArrowDown"))["ranking"] == "random"
    keyboard.press("Tab")
    assert settled(root, lambda: keyboard.press("ArrowDown"))["scope"] == "layer"
    keyboard.press("Tab")
    last = settled(root, lambda: keyboard.press("Enter"))
    for name in ("sparsity", "ranking", "scope", "accuracy", "kept"):
        assert last[name] == first[name]


def test_the_sentence_says_what_is_left(root: Locator) -> None:
    seen = set_slider(root, "weights removed", 90)
    said = words(root)
    assert f"{int(seen['kept']):,} of 3,552 weights are left" in said
    assert f"{100 * float(seen['accuracy']):.1f} % of the test digits" in said


def test_masks_of_a_setting_go_on_without_a_page() -> None:
    figure = Prune(sparsity=0.9)
    assert figure.masks.sparsity == pytest.approx(0.9, abs=1e-3)
    assert figure.accuracy is None
    figure.ranking = "largest"
    assert figure.masks != Prune(sparsity=0.9).masks
    with pytest.raises(Exception, match="sparsity"):
        figure.sparsity = 1.2
