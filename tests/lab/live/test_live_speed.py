"""Does the page take away what gradprune takes away, answer the same in all three ways, and measure when asked to?"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from page import facts, opened, set_slider, settled, words
from playwright.sync_api import Browser, Locator

import gradprune as gp
from gradprune import lab
from gradprune.lab.live import Speed, perceptron

SETTINGS = [
    (grain, sparsity) for grain in ("weights", "units") for sparsity in (0.0, 0.1, 0.33, 0.5, 0.8, 0.9, 0.95, 0.99)
]


@pytest.fixture
def root(browser: Browser, pages: dict[str, Path]) -> Iterator[Locator]:
    with opened(browser, pages["speed"]) as root:
        yield root


def choose(root: Locator, grain: str, sparsity: float) -> dict[str, str]:
    radio = root.locator(f"input[value={grain}]")
    if not radio.is_checked():
        settled(root, radio.check)
    if float(facts(root)["sparsity"]) != sparsity:
        set_slider(root, "removed", round(100 * sparsity))
    return facts(root)


def test_all_three_ways_read_as_gradprune_does_and_cost_what_a_report_counts(root: Locator) -> None:
    test = perceptron.digits().test
    for setting in SETTINGS:
        seen = choose(root, *setting)
        figure = Speed(grain=setting[0], sparsity=setting[1])
        network = figure.network
        figure.masks.apply_(network)
        small = gp.shrink(network, test.x[:4])
        for way in ("accuracy", "accuracyRows", "accuracyShrunk"):
            assert float(seen[way]) == pytest.approx(lab.train.accuracy(network, test), abs=1e-6), (setting, way)
        whole, left = (gp.report(model, test.x[:1]).total for model in (network, small))
        assert float(seen["maskedFlops"]) == whole.flops, setting
        assert float(seen["rowsFlops"]) == whole.effective_flops, setting
        assert float(seen["shrunkFlops"]) == left.flops, setting
        assert float(seen["maskedBytes"]) == whole.bytes_dense
        assert float(seen["shrunkBytes"]) == left.bytes_dense
        assert float(seen["rowsBytes"]) == whole.bytes_csr


def test_what_stands_where_no_script_runs_counts_what_the_page_counts(root: Locator) -> None:
    for grain in ("weights", "units"):
        whole = choose(root, grain, 0.0)
        for row in Speed(grain=grain).still().rows:
            seen = choose(root, grain, float(row[0].rstrip("%")) / 100)
            wanted = [seen["accuracy"]] + [
                float(seen[f"{way}{of}"]) / float(whole[f"masked{of}"])
                for way in ("rows", "shrunk")
                for of in ("Flops", "Bytes")
            ]
            for cell, value in zip(row[1:], wanted, strict=True):
                assert float(cell) == pytest.approx(float(value), abs=0.0051)


def test_nothing_is_measured_before_it_is_asked_for_and_then_every_way_is(root: Locator) -> None:
    assert facts(root)["measured"] == "0"
    assert "Press Measure here" in words(root)
    assert settled(root, root.get_by_role("button", name="Measure here").click)["measured"] == "5"
    assert "Measured in your browser at 90.0 %" in words(root)
    assert choose(root, "units", 0.9)["measured"] == "0"  # of the other nothing is known yet
    assert settled(root, root.get_by_role("button", name="Reset").click)["measured"] == "0"


def test_every_setting_is_reached_by_keyboard(root: Locator) -> None:
    keyboard = root.page.keyboard
    keyboard.press("Tab")
    assert settled(root, lambda: keyboard.press("ArrowLeft"))["sparsity"] == "0.89"
    keyboard.press("Tab")
    assert settled(root, lambda: keyboard.press("ArrowDown"))["grain"] == "units"
