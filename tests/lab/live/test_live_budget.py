"""Does the page find the sparsity that gradprune finds for a budget, and say what the network then costs?"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from page import facts, opened, set_slider, settled, words
from playwright.sync_api import Browser, Locator

import gradprune as gp
from gradprune import lab
from gradprune.lab.live import Budget, perceptron

SETTINGS = [
    ("accuracy", 0.0, 5, "global"),
    ("accuracy", 0.02, 8, "global"),
    ("accuracy", 0.05, 7, "layer"),
    ("accuracy", 0.3, 10, "layer"),
    ("accuracy", 0.115, 1, "global"),
    ("flops", 0.5, 6, "global"),
    ("flops", 0.105, 10, "layer"),
    ("flops", 0.73, 3, "layer"),
    ("bytes", 0.2, 9, "global"),
    ("bytes", 0.055, 10, "layer"),
    ("bytes", 0.9, 2, "global"),
    ("accuracy", 0.05, 0, "global"),
]


@pytest.fixture
def root(browser: Browser, pages: dict[str, Path]) -> Iterator[Locator]:
    with opened(browser, pages["budget"]) as root:
        yield root


def choose(root: Locator, bounded: str, limit: float, looks: int, scope: str) -> dict[str, str]:
    for value in (bounded, scope):
        radio = root.locator(f"input[value={value}]")
        if not radio.is_checked():
            settled(root, radio.check)
    if float(facts(root)["limit"]) != limit:
        set_slider(root, "what may it cost?", 100 * limit)
    if facts(root)["looks"] != str(looks):
        set_slider(root, "looks of the bisection", looks)
    return facts(root)


def test_page_and_gradprune_find_the_same_masks_which_cost_and_read_the_same(root: Locator) -> None:
    digits = perceptron.digits()
    for setting in SETTINGS:
        seen = choose(root, *setting)
        figure = Budget(**dict(zip(("bounded", "limit", "looks", "scope"), setting, strict=True)))
        network, masks = figure.network, figure.masks
        masks.apply_(network)
        assert int(seen["kept"]) == sum(int(mask.sum()) for mask in masks.values()), setting
        total = gp.report(network, digits.test.x[:1]).total
        expected = {
            "validation": lab.train.accuracy(network, digits.validation),
            "test": lab.train.accuracy(network, digits.test),
            "flops": total.effective_flops / total.flops,
            "bytes": total.bytes_bitmask / total.bytes_dense,
        }
        for name, value in expected.items():
            assert float(seen[name]) == pytest.approx(value, abs=1e-6), (setting, name)


def test_what_is_found_keeps_the_budget_and_one_step_of_the_interval_more_does_not(root: Locator) -> None:
    dense = float(choose(root, "accuracy", 0.05, 0, "global")["validation"])
    seen = choose(root, "accuracy", 0.05, 10, "global")
    assert float(seen["validation"]) >= dense - 0.05
    assert float(seen["high"]) - float(seen["low"]) == pytest.approx(0.5**10)
    seen = choose(root, "bytes", 0.3, 10, "global")
    assert float(seen["bytes"]) <= 0.3 < float(seen["bytes"]) + 0.01


def test_a_cost_below_the_least_is_said_not_to_be_met(root: Locator) -> None:
    seen = choose(root, "bytes", 0.02, 4, "global")
    assert seen["met"] == "false"
    assert "no sparsity meets that" in words(root)


def test_every_setting_is_reached_by_keyboard(root: Locator) -> None:
    keyboard = root.page.keyboard
    keyboard.press("Tab")
    assert settled(root, lambda: keyboard.press("ArrowDown"))["bounded"] == "flops"
    keyboard.press("Tab")
    assert settled(root, lambda: keyboard.press("ArrowRight"))["limit"] == "0.055"
    keyboard.press("Tab")
    assert settled(root, lambda: keyboard.press("ArrowLeft"))["looks"] == "7"
    keyboard.press("Tab")
    assert settled(root, lambda: keyboard.press("ArrowDown"))["scope"] == "layer"
