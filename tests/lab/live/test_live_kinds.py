"""Do the page's four kinds of network lose the weights that gradprune takes, and train as torch has it?"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import page_batches
from live_reference import mulberry32
from page import facts, opened, set_slider, settled, words
from playwright.sync_api import Browser, Locator
from torch import nn
from torch.nn import functional

import gradprune as gp
from gradprune import lab
from gradprune.lab import zoo
from gradprune.lab.live import Kinds, chance, figure, kinds, perceptron
from gradprune.lab.live.kinds import KINDS

SETTINGS = [
    ("perceptron", 0.9, "smallest", "layer"),
    ("perceptron", 0.0, "smallest", "global"),
    ("perceptron", 0.985, "random", "global"),
    ("convolutional", 0.5, "random", "layer"),
    ("convolutional", 0.9, "smallest", "global"),
    ("convolutional", 0.99, "smallest", "global"),
    ("recurrent", 0.8, "smallest", "global"),
    ("recurrent", 0.95, "smallest", "layer"),
    ("recurrent", 0.3, "random", "global"),
    ("self-attention", 0.7, "smallest", "global"),
    ("self-attention", 0.9, "random", "layer"),
    ("self-attention", 0.975, "smallest", "layer"),
]


@pytest.fixture(scope="module")
def page(pages: dict[str, Path]) -> Path:
    return pages["kinds"]


@pytest.fixture
def root(browser: Browser, page: Path) -> Iterator[Locator]:
    with opened(browser, page) as root:
        yield root


def choose(root: Locator, kind: str, sparsity: float, ranking: str, scope: str) -> dict[str, str]:
    for wanted in (kind, ranking, scope):
        radio = root.locator(f"input[value='{wanted}']")
        if not radio.is_checked():
            settled(root, radio.check)
    seen = facts(root)
    if float(seen["sparsity"]) != sparsity:
        seen = set_slider(root, "weights removed", 100 * sparsity)
    return seen


def numbers(root: Locator) -> np.ndarray:
    return np.array(root.evaluate("(root) => [...root.numbers()]"))


def train(root: Locator) -> dict[str, str]:
    return settled(root, lambda: root.get_by_role("button", name="Train").click())


def pruned(kind: str, sparsity: float, ranking: str, scope: str) -> tuple[nn.Module, gp.Masks]:
    """The network by gradprune alone: chance by other code than the figure's."""
    model = kinds.trained(kind)
    score = gp.magnitude
    if ranking == "random":
        draws = iter(mulberry32(0, sum(p.numel() for p in model.parameters())))
        drawn = {
            name: torch.tensor([next(draws) for _ in range(mask.numel())], dtype=torch.float64).view_as(mask)
            for name, mask in gp.prune(model, sparsity=0.0).items()
        }
        return model, gp.prune(model, lambda model: drawn, sparsity=sparsity, scope=scope, min_keep=1)
    return model, gp.prune(model, score, sparsity=sparsity, scope=scope, min_keep=1)


def flat(model: nn.Module) -> np.ndarray:
    return nn.utils.parameters_to_vector(model.parameters()).detach().numpy()


def read(model: nn.Module) -> float:
    test = perceptron.digits().test
    with torch.no_grad():
        return float((model(test.x.double()).argmax(1) == test.y).double().mean())


def test_the_weights_and_what_is_read_are_gradprunes(root: Locator) -> None:
    for setting in SETTINGS:
        seen = choose(root, *setting)
        model, masks = pruned(*setting)
        assert (numbers(root) == flat(model)).all()
        kept, total = sum(int(mask.sum()) for mask in masks.values()), sum(mask.numel() for mask in masks.values())
        assert [int(seen[name]) for name in ("kept", "zeros", "weights")] == [kept, total - kept, total]
        assert float(seen["pruned"]) == float(seen["corrected"]) == pytest.approx(read(model), abs=1e-9)
        assert float(seen["dense"]) == pytest.approx(read(kinds.trained(setting[0])), abs=1e-9)
        figure = Kinds(**dict(zip(("kind", "sparsity", "ranking", "scope"), setting, strict=True)))
        assert all(torch.equal(mask, masks[name]) for name, mask in figure.masks.items())


def test_the_share_that_each_part_keeps_is_that_of_its_mask(root: Locator) -> None:
    for kind, at in (("self-attention", ["pixels", "query", "key", "value", "output", "head"]), ("recurrent", [])):
        seen = choose(root, kind, 0.85, "smallest", "global")
        _, masks = pruned(kind, 0.85, "smallest", "global")
        shown = {name: float(share) for name, share in (part.split(": ") for part in seen["shares"].split(", "))}
        assert shown == pytest.approx(kinds.kept_shares(kind, masks))
        if at:
            assert list(shown) == at
            packed = masks["attention.0.in_proj_weight"]
            assert shown["key"] == pytest.approx(float(packed[32:64].double().mean()))


def step_by_torch(model: nn.Module, masks: gp.Masks, kind: str, steps: int) -> nn.Module:
    row, data = KINDS[kind].row, perceptron.digits().train
    adam = torch.optim.Adam(model.parameters(), lr=row.rate)
    masks.hold(adam, model)
    for step, rows in enumerate(page_batches(0, len(data), 32, steps)):
        adam.param_groups[0]["lr"] = row.rate * (1 - step / (row.steps // 2))
        adam.zero_grad()
        functional.cross_entropy(model(data.x[rows].double()), data.y[rows]).backward()
        adam.step()
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_its_first_steps_are_those_of_torchs_adam_under_held_masks(kind: str, browser: Browser, page: Path) -> None:
    setting = (kind, 0.8, "smallest", "global")
    with opened(browser, page, reduced_motion="no-preference") as root:
        choose(root, *setting)
        root.get_by_role("button", name="Train").click()
        root.page.wait_for_function("(root) => Number(root.dataset.steps) >= 1", arg=root.element_handle())
        paused = settled(root, lambda: root.get_by_role("button", name="Pause").click())
        found = numbers(root)
        model, masks = pruned(*setting)
        expected = flat(step_by_torch(model, masks, kind, int(paused["steps"])))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        assert (found == 0).sum() >= int(paused["zeros"])
        root.get_by_role("button", name="Train").click()  # and it goes on
        steps = KINDS[kind].row.steps // 2
        root.page.wait_for_function(f"(root) => root.dataset.steps === '{steps}'", arg=root.element_handle())


@pytest.mark.parametrize(("kind", "ranking"), [(kind, ranking) for kind in KINDS for ranking in ("smallest", "random")])
def test_after_all_steps_it_reads_what_python_says(root: Locator, kind: str, ranking: str) -> None:
    choose(root, kind, 0.9, ranking, "global")
    seen = train(root)
    assert int(seen["steps"]) == KINDS[kind].row.steps // 2
    model = kinds.corrected(kind, 0.9, ranking, "global")
    # Rounding grows over hundreds of steps; a digit or two near the border may be read otherwise.
    assert float(seen["corrected"]) == pytest.approx(read(model), abs=2.5 / 359)
    assert float(seen["corrected"]) > float(seen["pruned"])
    assert root.get_by_role("button", name="Train").is_disabled()


def test_every_control_works_by_keyboard_and_reset_restores_the_first(root: Locator) -> None:
    first, keyboard = facts(root), root.page.keyboard
    keyboard.press("Tab")
    assert settled(root, lambda: keyboard.press("ArrowRight"))["kind"] == "convolutional"
    keyboard.press("Tab")
    assert settled(root, lambda: keyboard.press("End"))["sparsity"] == "0.99"
    keyboard.press("Tab")
    assert settled(root, lambda: keyboard.press("ArrowDown"))["ranking"] == "random"
    keyboard.press("Tab")
    assert settled(root, lambda: keyboard.press("ArrowDown"))["scope"] == "layer"
    keyboard.press("Tab")
    assert settled(root, lambda: keyboard.press("Enter"))["steps"] == "300"
    root.get_by_role("button", name="Reset").focus()
    last = settled(root, lambda: keyboard.press("Enter"))
    for name in ("kind", "sparsity", "ranking", "scope", "steps", "pruned", "corrected", "kept", "shares"):
        assert last[name] == first[name]


def test_the_sentence_says_what_is_shown(root: Locator) -> None:
    seen = choose(root, "recurrent", 0.9, "smallest", "global")
    assert words(root).startswith("317 of the recurrent network's 3,168 weights are left, 2,851 are zero.")
    assert f"and {100 * float(seen['pruned']):.1f} % pruned. Of its" in words(root)
    seen = train(root)
    assert f"after 300 of 300 steps of training it reads {100 * float(seen['corrected']):.1f} %" in words(root)
    choose(root, "recurrent", 0.0, "smallest", "global")
    assert words(root).endswith("Each of its matrices keeps 100.0 %.")


def test_each_network_is_one_of_the_chapters_and_reaches_its_level() -> None:
    for kind, made in KINDS.items():
        row = zoo.by_name(made.row.name)
        assert (made.row.rate, made.row.steps, made.row.optimizer) == (row.rate, row.steps, "adam")
        validation = perceptron.digits().validation
        with torch.no_grad():
            right = kinds.trained(kind)(validation.x.double()).argmax(1) == validation.y
        assert float(right.double().mean()) >= row.level
        same = {n: p.shape for n, p in made.row.build(0).named_parameters()}
        whole = {n: p.shape for n, p in row.build(0).named_parameters()}
        assert same.items() < whole.items() if kind == "self-attention" else same == whole


def test_a_network_trained_anew_reads_as_the_stored_one() -> None:
    made = lab.experiment.script("live_kinds").trained("recurrent")
    assert read(made) == pytest.approx(read(kinds.trained("recurrent")), abs=0.02)


def test_the_network_takes_the_masks_and_is_a_copy() -> None:
    made = figure("kinds")
    assert isinstance(made, Kinds)
    model, before = made.network, flat(made.network)
    made.masks.apply_(model)
    assert made.masks.sparsity == pytest.approx(0.9, abs=1e-4)
    assert lab.train.accuracy(model, perceptron.digits().test) == pytest.approx(read(model.double()), abs=1.5 / 359)
    assert (flat(made.network) == before).all()


def test_chance_is_the_pages() -> None:
    for seed in (0, 1, -3, 2**31 + 7):
        assert chance.uniform(seed, 50).tolist() == mulberry32(seed, 50)
    for rows, batch, steps in ((11, 4, 9), (1150, 32, 40), (5, 5, 3), (7, 3, 1)):
        assert chance.batches(2, rows, batch, steps) == page_batches(2, rows, batch, steps)


def test_a_page_of_the_figure_weighs_less_than_400_kilobytes(page: Path) -> None:
    assert page.stat().st_size < 400_000
