"""Does the page walk down the cell's loss as torch walks, under gradprune's clips?"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from page import facts, opened, set_slider, settled, words, write_page
from playwright.sync_api import Browser, Locator

from gradprune.lab.live import Clip
from gradprune.lab.live.clip import CELL, SMALL_RATE, START, STEPS

SETTINGS = [  # w, b, rate, momentum, bound, kind
    (1.2, -0.5, 0.05, 0.0, 1.0, "norm"),
    (1.2, -0.5, 0.05, 0.0, 1.0, "value"),
    (1.2, -0.5, 2e-5, 0.0, 1.0, "norm"),
    (0.6, -0.8, 0.02, 0.0, 0.3, "value"),
    (0.6, -0.8, 0.02, 0.0, 4.0, "norm"),
    (0.8, 0.1, 0.005, 0.0, 64.0, "norm"),
    (1.4, 1.0, 0.1, 0.0, 10.0, "norm"),
    (1.4, -1.0, 0.1, 0.9, 0.1, "value"),
    (1.0, 0.0, 0.01, 0.5, 0.63, "value"),
    (0.2, 1.0, 0.05, 0.9, 2.0, "norm"),
    (0.95, 0.33, 0.03, 0.7, 0.16, "norm"),
    (1.13, -0.2, 0.05, 0.3, 16.0, "value"),
]
NAMES = ("w", "b", "rate", "momentum", "bound", "kind")


@pytest.fixture
def root(browser: Browser, pages: dict[str, Path]) -> Iterator[Locator]:
    with opened(browser, pages["clip"]) as root:
        yield root


def page_of(browser: Browser, tmp_path: Path, figure: Clip, **options: Any) -> Any:
    return opened(browser, write_page(figure, tmp_path / "page.html"), **options)


def numbers(root: Locator) -> dict[str, Any]:
    """Both walks as the page computed them, and the cell at their start."""
    cell = "Object.fromEntries(Object.entries(both.cell).map(([name, of]) => [name, of.length ? [...of] : of]))"
    found: dict[str, Any] = root.evaluate(
        f"(root) => {{ const both = root.numbers(); return {{ ...both, cell: {cell} }}; }}"
    )
    return found


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_page_and_gradprune_take_the_same_steps(browser: Browser, tmp_path: Path, setting: tuple[Any, ...]) -> None:
    figure = Clip(**dict(zip(NAMES, setting, strict=True)))
    with page_of(browser, tmp_path, figure) as root:
        seen, found = facts(root), numbers(root)
    assert [float(seen[name]) for name in NAMES[:-1]] == list(setting[:-1])
    assert seen["kind"] == figure.kind
    for name, clipped in (("unclipped", False), ("clipped", True)):
        mine, page = figure.walk(clipped), found[name]
        assert (len(page["lengths"]), page["finite"]) == (len(mine.lengths), mine.finite)
        assert (seen[f"{name}Steps"], seen[f"{name}Finite"]) == (str(len(mine.lengths)), str(mine.finite).lower())
        for what in ("points", "losses", "lengths"):
            np.testing.assert_allclose(page[what], getattr(mine, what), rtol=1e-5, atol=1e-9, err_msg=f"{name} {what}")
        tell = mine.lengths.numpy() > 1e-7  # a shorter step points where rounding does
        assert tell.any()
        np.testing.assert_allclose(np.array(page["angles"])[tell], mine.angles.numpy()[tell], rtol=1e-5, atol=1e-5)


def test_the_settings_cover_walks_that_overflow_that_turn_and_that_arrive() -> None:
    walks = [Clip(**dict(zip(NAMES, setting, strict=True))).walk(clipped) for setting in SETTINGS for clipped in (0, 1)]
    assert {walk.finite for walk in walks} == {True, False}
    assert sum(float(walk.angles.max()) > 5 for walk in walks) > 3
    assert any(walk.losses[-1] < 1e-6 for walk in walks)


@pytest.mark.parametrize("w", [0.3, 0.97, 1.0, 1.37])
def test_the_cells_gradient_is_that_of_autograd_at_each_state(browser: Browser, tmp_path: Path, w: float) -> None:
    with page_of(browser, tmp_path, Clip(w=w, b=0.4)) as root:
        cell = numbers(root)["cell"]
    states = [torch.tensor(CELL["first"], dtype=torch.float64, requires_grad=True)]
    parameters = torch.tensor([w, 0.4], dtype=torch.float64, requires_grad=True)
    for _ in range(CELL["steps"]):
        states.append(parameters[0] * states[-1] + parameters[1])
    loss = (states[-1] - CELL["target"]) ** 2
    at_parameters, *at_states = torch.autograd.grad(loss, [parameters, *states])
    np.testing.assert_allclose(cell["loss"], loss.item(), rtol=1e-9)
    np.testing.assert_allclose(cell["states"], [state.item() for state in states], rtol=1e-9)
    np.testing.assert_allclose(cell["atStates"], [grad.item() for grad in at_states], rtol=1e-9)
    np.testing.assert_allclose(cell["gradient"], at_parameters, rtol=1e-9)


def test_every_setting_is_reached_by_keyboard_and_reset_restores_the_first(root: Locator) -> None:
    first, keyboard = facts(root), root.page.keyboard
    ends = {"w": "1.4", "b": "1", "rate": "0.1", "momentum": "0.9", "bound": "63"}
    for name, last in ends.items():
        keyboard.press("Tab")
        assert settled(root, lambda: keyboard.press("End"))[name] == last
        assert settled(root, lambda: keyboard.press("ArrowLeft"))[name] != last
    keyboard.press("Tab")
    assert settled(root, lambda: keyboard.press("ArrowDown"))["kind"] == "value"
    keyboard.press("Tab")
    assert settled(root, lambda: keyboard.press("Enter"))["shown"] == str(STEPS)
    keyboard.press("Tab")
    last = settled(root, lambda: keyboard.press("Enter"))
    for name in first.keys() - {"drawn", "frame", "step", "running"}:
        assert last[name] == first[name], name


def test_the_walks_begin_where_the_map_is_pressed_and_dragged_to(root: Locator) -> None:
    chart = root.locator(".gp-live-layers > svg")
    chart.scroll_into_view_if_needed()
    shades, whole = root.locator("canvas.gp-live-heat").bounding_box(), chart.bounding_box()
    assert shades is not None
    assert whole is not None
    assert shades["width"] / whole["width"] == pytest.approx((340 - 66) / 340, abs=0.01)
    mouse = root.page.mouse

    def at(w: float, b: float) -> tuple[float, float]:
        across, up = (w - 0.2) / 1.2, (b + 1) / 2
        return shades["x"] + across * shades["width"], shades["y"] + (1 - up) * shades["height"]

    def press() -> None:
        mouse.move(*at(0.5, 0.5))
        mouse.down()

    seen = settled(root, press)
    assert [float(seen[name]) for name in "wb"] == pytest.approx([0.5, 0.5], abs=0.02)
    seen = settled(root, lambda: mouse.move(*at(1.1, -0.25)))
    assert [float(seen[name]) for name in "wb"] == pytest.approx([1.1, -0.25], abs=0.02)
    mouse.move(*at(3, -3))  # off the map: its edge
    mouse.up()
    root.page.wait_for_function("(root) => root.dataset.w === '1.4'", arg=root.element_handle())
    assert facts(root)["b"] == "-1"
    assert root.get_by_label("weight w at the start").input_value() == "1.4"
    dark, light = root.evaluate(
        """(root) => { const canvas = root.querySelector("canvas.gp-live-heat");
        const alpha = (x, y) => canvas.getContext("2d").getImageData(x, y, 1, 1).data[3];
        return [alpha(canvas.width - 1, 0), alpha(canvas.width >> 1, canvas.height >> 1)]; }"""
    )
    assert dark > light + 50  # the wall at w = 1.4 and the plain


def test_the_sentence_says_where_both_walks_end_and_what_the_weight_does(browser: Browser, tmp_path: Path) -> None:
    with page_of(browser, tmp_path, Clip()) as root:
        assert "the loss is too large for a number after 2 steps, the longest 1·10¹⁴⁷" in words(root)
        assert "With a bound of 1, 60 steps, the longest 0.05, end at a loss of 0.051" in words(root)
        assert "turned" not in words(root)
        assert "together by 38: above 1 it explodes" in words(root)
        seen = set_slider(root, "learning rate", -4.7)
        assert float(seen["rate"]) == SMALL_RATE
        assert "Without a bound, 60 steps, the longest 2.5, end at a loss of 1.5" in words(root)
        set_slider(root, "weight w at the start", 1)
        assert "at 1 it does neither" in words(root)
        seen = set_slider(root, "weight w at the start", 0.8)
        assert float(seen["factor"]) == pytest.approx(0.8**20)
        assert "together by 0.012: below 1 it vanishes" in words(root)
    with page_of(browser, tmp_path, Clip(kind="value")) as root:
        said = words(root)
        turn = float(Clip(kind="value").walk().angles.max())
        assert "With each entry at most 1, 60 steps" in said
        assert f"turned by up to {turn:.0f}°" in said


def test_how_far_each_step_is_turned_is_drawn_beside_its_length(browser: Browser, tmp_path: Path) -> None:
    bottom, top = 192, 10  # of the axis, in the picture's units
    for figure in (Clip(kind="value", w=0.6, b=-0.8, rate=0.02), Clip(momentum=0.9), Clip()):
        with page_of(browser, tmp_path, figure) as root:
            dots = root.locator(".gp-live-chart").nth(3).locator("circle.gp-clipped").all()
            degrees = [180 * (bottom - float(dot.get_attribute("cy") or "nan")) / (bottom - top) for dot in dots]
        walk = figure.walk()
        assert degrees == pytest.approx(walk.angles.tolist(), abs=0.5)
        assert (float(walk.angles.max()) > 5) == (figure.kind == "value" or figure.momentum > 0)


def test_play_shows_the_steps_one_after_the_other_and_less_motion_only_the_end(
    browser: Browser, tmp_path: Path, root: Locator
) -> None:
    assert settled(root, root.get_by_role("button", name="Play").click)["shown"] == str(STEPS)
    with page_of(browser, tmp_path, Clip(), reduced_motion="no-preference") as moving:
        longest = moving.locator("path.gp-live-line.gp-clipped").first
        whole = longest.get_attribute("d")
        moving.get_by_role("button", name="Play").click()
        moving.page.wait_for_function("(root) => root.dataset.running === 'true'", arg=moving.element_handle())
        paths = set()
        while facts(moving)["running"] == "true":
            paths.add(longest.get_attribute("d"))
        moving.page.wait_for_function(f"(root) => root.dataset.shown === '{STEPS}'", arg=moving.element_handle())
        assert len(paths) > 10
        assert longest.get_attribute("d") == whole


def test_ranges_of_the_page_are_those_of_python(root: Locator) -> None:
    sliders = {"w": "weight w at the start", "b": "bias b at the start", "rate": "learning rate"}
    sliders |= {"momentum": "momentum", "bound": "size of the bound"}
    for name, label in sliders.items():
        trait, ends = Clip.class_traits()[name], root.get_by_label(label)
        low, high = (float(ends.get_attribute(end) or "nan") for end in ("min", "max"))
        if name in ("rate", "bound"):  # these go by powers of ten
            low, high = 10**low, 10**high
        assert low == pytest.approx(trait.min)
        assert 0.9 * trait.max < high < trait.max * 1.0001


def test_walks_go_on_without_a_page() -> None:
    figure = Clip(kind="value")
    assert figure.path().shape == (STEPS + 1, 2)
    assert figure.path()[0].tolist() == [START["w"], START["b"]]
    assert len(figure.path(clipped=False)) == 3
    assert (figure.path()[1] - figure.path()[0]).abs().tolist() == pytest.approx([0.05, 0.05])
    for name, wrong in {"w": 2.0, "bound": 0.0, "kind": "by unit"}.items():
        with pytest.raises(Exception, match=name):
            setattr(figure, name, wrong)
