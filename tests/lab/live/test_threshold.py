"""Do the page's three trainings send and keep what gradprune sends and keeps?"""

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
from gradprune.lab.live import Threshold, perceptron
from gradprune.lab.live.threshold import BATCH, RATE, STEPS

DENSITIES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@pytest.fixture
def root(browser: Browser, tmp_path: Path) -> Iterator[Locator]:
    with opened(browser, write_page(Threshold(), tmp_path / "page.html")) as root:
        yield root


def train(root: Locator) -> dict[str, str]:
    return settled(root, lambda: root.get_by_role("button", name="Train").click())


def numbers(root: Locator, kind: str) -> np.ndarray:
    return np.array(root.evaluate("(root, kind) => [...root.numbers(kind)]", kind), dtype=np.float32)


def by_gradprune(density: float, kind: str) -> tuple[nn.Module, int, float]:
    """The network, the entries sent, and the norm of what waits or is lost, on the page's batches."""
    model, data = perceptron.untrained(), perceptron.digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    feedback = gp.ErrorFeedback(model, density=density)
    entries = sum(parameter.numel() for parameter in model.parameters())
    lost = [torch.zeros_like(parameter) for parameter in model.parameters()]
    sent = 0.0
    for rows in page_batches(0, len(data.train), BATCH, STEPS):
        optimizer.zero_grad()
        functional.cross_entropy(model(data.train.x[rows]), data.train.y[rows]).backward()
        before = [parameter.grad.clone() for parameter in model.parameters()]
        kept = {"all": lambda: 1.0, "lost": lambda: gp.keep_top_gradients_(model, density), "kept": feedback.step}[
            kind
        ]()
        sent += entries * kept
        for total, grad, parameter in zip(lost, before, model.parameters(), strict=True):
            total += grad - parameter.grad
        optimizer.step()
    rest = [tensor.flatten() for tensor in lost]
    return model, round(sent), float(torch.cat(rest).norm())


@pytest.mark.parametrize("density", DENSITIES)
def test_what_is_sent_and_waits_or_is_lost_is_gradprunes(root: Locator, density: float) -> None:
    if density != float(facts(root)["density"]):
        density = float(set_slider(root, "entries of the gradient that are sent", np.log10(density))["density"])
    seen = train(root)
    assert int(seen["steps"]) == STEPS
    for kind in ("all", "lost", "kept"):
        model, sent, rest = by_gradprune(density, kind)
        assert int(seen[f"{kind}Sent"]) == sent
        accuracy = lab.train.accuracy(model, perceptron.digits().test)
        # Single precision: after 270 steps an entry near the cut may go in one and wait in the other.
        assert float(seen[kind]) == pytest.approx(accuracy, abs=4 / 359)
        if kind != "all":
            assert float(seen[f"{kind}Waiting"]) == pytest.approx(rest, rel=0.05, abs=1e-3)
        if kind == "all":
            expected = nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
            np.testing.assert_allclose(numbers(root, kind), expected, rtol=1e-3, atol=1e-4)


def test_every_control_works_by_keyboard_and_reset_restores_the_first(root: Locator) -> None:
    first, keyboard = facts(root), root.page.keyboard
    keyboard.press("Tab")
    assert settled(root, lambda: keyboard.press("End"))["density"] == "1"
    assert settled(root, lambda: keyboard.press("Home"))["density"] == "0.001"
    keyboard.press("Tab")
    assert settled(root, lambda: keyboard.press("Enter"))["steps"] == str(STEPS)
    root.get_by_role("button", name="Reset").focus()
    last = settled(root, lambda: keyboard.press("Enter"))
    for name in ("density", "steps", "all", "lost", "kept", "allSent", "keptSent", "lostSent"):
        assert last[name] == first[name]
    assert root.get_by_role("button", name="Train").is_enabled()


def test_the_sentence_says_what_was_sent_and_read(root: Locator) -> None:
    assert "will be sent. Press Train." in root.locator(".gp-live-words").inner_text()
    seen = train(root)
    words = root.locator(".gp-live-words").inner_text()
    assert f"{int(seen['keptSent']):,} entries sent instead of {int(seen['allSent']):,}" in words
    assert f"{100 * float(seen['lost']):.1f} % of the test digits if the rest is lost" in words
    assert f"{100 * float(seen['kept']):.1f} % if it waits" in words


def test_the_setting_goes_on_without_a_page() -> None:
    figure = Threshold(density=0.1)
    network = figure.network
    functional.cross_entropy(network(perceptron.digits().train.x), perceptron.digits().train.y).backward()
    assert figure.feedback(network).step() == pytest.approx(0.1, abs=1e-3)
    with pytest.raises(Exception, match="density"):
        figure.density = 0.0
