"""Does the page take away the weights that gradprune takes away, and read what is left as torch does?"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
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


def read_by_digit(figure: Prune) -> list[float]:
    """The share of the test examples of each digit that the figure's network reads correctly."""
    network, test = figure.network, perceptron.digits().test
    figure.masks.apply_(network)
    right = (network(test.x).argmax(1) == test.y).double()
    return [float(right[test.y == digit].mean()) for digit in range(10)]


def test_each_digits_share_is_of_its_own_examples(root: Locator) -> None:
    for sparsity in (0.0, 0.8, 0.95):
        if sparsity:
            set_slider(root, "weights removed", 100 * sparsity)
        shares = read_by_digit(Prune(sparsity=sparsity))
        for name, share in (("worst", min(shares)), ("best", max(shares))):
            assert f"digit {shares.index(share)} {name} ({100 * share:.1f} %)" in words(root)
        heights = bars(root.locator(".gp-live-chart").nth(3).locator("path.gp-live-bars"), 1.0)
        assert heights == pytest.approx(shares, abs=1e-3)


def bars(path: Locator, highest: float) -> list[float]:
    """How high the bars of a chart are, on an axis from 0 to `highest`."""
    bottom, top = 192, 10  # of the axis, in the picture's units
    tops = re.findall(r"V([-\d.]+)H", path.get_attribute("d") or "")
    return [(bottom - float(y)) / (bottom - top) * highest for y in tops]


@pytest.mark.parametrize(("ranking", "scope"), [("smallest", "global"), ("smallest", "layer"), ("largest", "global")])
def test_the_histogram_counts_what_stays_and_all_and_has_the_threshold(root: Locator, ranking: str, scope: str) -> None:
    choose(root, ranking, scope)
    chart = root.locator(".gp-live-chart").nth(1)
    assert chart.locator(".gp-live-rule").count() == 0
    set_slider(root, "weights removed", 70)
    figure = Prune(ranking=ranking, scope=scope, sparsity=0.7)
    masks = figure.masks
    weights = {name: parameter.detach() for name, parameter in figure.network.named_parameters() if name in masks}
    every = torch.cat([weight.flatten() for weight in weights.values()])
    stays = torch.cat([weight[masks[name]] for name, weight in weights.items()])
    ends = {"bins": 48, "range": (-float(every.abs().max()), float(every.abs().max()))}
    counts = {"gp-pruned": np.histogram(every, **ends)[0], "gp-dense": np.histogram(stays, **ends)[0]}
    for name, wanted in counts.items():
        found = bars(chart.locator(f"path.gp-live-bars.{name}"), 1.05 * counts["gp-pruned"].max())
        assert found == pytest.approx(wanted.tolist(), abs=1.5)
    below = {name: mask if ranking == "largest" else ~mask for name, mask in masks.items()}
    highest = [float(weight[below[name]].abs().max()) for name, weight in weights.items()]
    wanted = [max(highest)] if scope == "global" else sorted(highest)
    rules = [float(rule.get_attribute("x1") or "nan") for rule in chart.locator(".gp-live-rule").all()]
    left, right, end = 54, 328, ends["range"][1]  # of the axis, in the picture's units
    places = sorted((2 * (x - left) / (right - left) - 1) * end for x in rules)
    assert places == pytest.approx([-place for place in wanted[::-1]] + wanted, abs=1e-5)


def test_masks_of_a_setting_go_on_without_a_page() -> None:
    figure = Prune(sparsity=0.9)
    assert figure.masks.sparsity == pytest.approx(0.9, abs=1e-3)
    assert figure.accuracy is None
    figure.ranking = "largest"
    assert figure.masks != Prune(sparsity=0.9).masks
    with pytest.raises(Exception, match="sparsity"):
        figure.sparsity = 1.2
