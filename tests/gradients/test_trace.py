"""Do traces and logs compare as their numbers do, and do their pictures show what was recorded?"""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
from torch import nn

import gradprune as gp


def traced(steps=5, layers=2):
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(layers) for layer in (nn.Linear(4, 4), nn.Tanh())])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = gp.Recorder(model, optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(3, 4)).sum().backward()
        optimizer.step()
    return recorder.trace


def logged(kind="norm", window=10_000):
    log, parameter = gp.ClipLog(window), nn.Parameter(torch.ones(2))
    for size in (0.5, 4.0, math.inf, 0.0, 10.0):
        parameter.grad = torch.full((2,), size)
        if kind == "norm":
            gp.clip_by_norm_(parameter, 2.0, nonfinite="zero", log=log)
        elif kind == "value":
            gp.clip_by_value_(parameter, 2.0, nonfinite="zero", log=log)
        else:
            gp.clip_adaptive_(parameter, 2.0, nonfinite="zero", log=log)
    return log


def test_traces_are_equal_where_all_their_numbers_are_also_where_these_are_nan():
    one, other = traced(), traced()
    assert one == other
    one.gradients["0.weight"][1] = float("nan")
    other.gradients["0.weight"][1] = float("nan")
    assert one == other
    other.gradients["0.weight"][1] = 1.0
    assert one != other
    other = copy.deepcopy(one)
    other.activations["0"]["std"].append(1.0)
    assert one != other
    assert one != vars(one)
    assert gp.Trace() == gp.Trace()
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)


def test_a_trace_is_drawn_with_a_line_for_each_parameter_and_module():
    trace = traced()
    figure = trace.plot()
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels[0] == "norm of the gradient"
    assert len(labels) == 3
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == list(trace.gradients)
    for line in lines:
        assert list(line.get_xdata()) == trace.steps
        assert list(line.get_ydata()) == pytest.approx(trace.gradients[line.get_label()])
    assert all(axes.get_yscale() == "log" for axes in figure.axes)
    assert figure.axes[-1].get_xlabel() == "step"
    assert figure.get_suptitle() == "5 recorded steps, first layer dark, last layer light"
    light = [sum(line.get_color()[:3]) for line in lines]
    assert light == sorted(light)
    assert light[0] < 1 < light[-1]


def test_a_trace_of_many_layers_names_the_first_the_last_and_some_between():
    trace = traced(steps=40, layers=20)
    figure = trace.plot()
    named = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert len(named) == 10
    assert (named[0], named[-1]) == ("0.weight", "38.bias")
    assert len(figure.axes[0].get_lines()) == 40


def test_what_was_not_recorded_has_no_panel_and_zeros_no_place():
    trace = gp.Trace(steps=[0, 1, 2], gradients={"w": [1.0, 0.0, math.inf]})
    (axes,) = trace.plot().axes
    (line,) = axes.get_lines()
    assert [math.isnan(number) for number in line.get_ydata()] == [False, True, True]
    with pytest.raises(ValueError, match="there is nothing to plot: no step was recorded"):
        gp.Trace().plot()


@pytest.mark.parametrize("kind", ["norm", "value", "adaptive"])
def test_a_log_is_drawn_with_its_sizes_bounds_and_factors(kind):
    log = logged(kind)
    figure = log.plot()
    above, below = figure.axes
    sizes, bounds = above.get_lines()
    assert list(sizes.get_xdata()) == [0, 1, 4]  # what is not finite, or zero, has no place on a logarithmic axis
    assert list(sizes.get_ydata()) == pytest.approx([log.sizes[at] for at in (0, 1, 4)])
    assert list(bounds.get_ydata()) == log.bounds
    assert list(bounds.get_xdata()) == list(below.get_lines()[0].get_xdata()) == log.steps
    assert list(below.get_lines()[0].get_ydata()) == pytest.approx(log.factors)
    assert (above.get_yscale(), below.get_xlabel()) == ("log", "call")
    assert above.get_ylabel() in (
        "norm of the gradients",
        "largest gradient entry",
        "norm of a unit, over its weights'",
    )
    name = "unit" if kind == "adaptive" else kind
    assert figure.get_suptitle() == f"clipping by {name} engaged in 2 of 5 calls (40.0 %)"


def test_pictures_are_drawn_to_a_file_and_no_window(tmp_path):
    for number, thing in enumerate((traced(), traced(40, 20), logged())):
        thing.plot().savefig(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 5000


def test_an_empty_log_has_no_picture():
    with pytest.raises(ValueError, match="there is nothing to plot: pass the log to a clip, log=log"):
        gp.ClipLog().plot()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for thing in (traced(), logged()):
        with pytest.raises(ImportError, match=r"plot\(\) needs matplotlib: pip install matplotlib"):
            thing.plot()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "size"}, "kind must be one of"),
        ({"kind": 3}, "'kind' in the state of ClipLog must be str"),
        ({"calls": "4"}, "'calls' in the state"),
        ({"calls": -1}, "calls must be at least 0"),
        ({"engaged": 9}, "engaged must be between 0 and 5"),
        ({"skipped": -1}, "skipped must be between 0 and 5"),
        ({"nonfinite": {"w": "x"}}, "nonfinite"),
        ({"nonfinite": []}, "'nonfinite' in the state"),
        ({"window": 0}, "window must be at least 1"),
        ({"rows": 3}, "'rows' in the state"),
        ({"rows": [[1.0]]}, r"numbers \(size, bound, factor, share\)"),
        ({"rows": ["1234"]}, "numbers"),
        ({"rows": [[1.0, 1.0, 1.0, "x"]]}, "numbers"),
    ],
    ids=str,
)
def test_a_damaged_state_of_a_log_changes_nothing(change, message):
    log = logged()
    before = log.state_dict()
    with pytest.raises((ValueError, TypeError), match=message):
        log.load_state_dict(before | change)
    with pytest.raises(TypeError, match="a state of ClipLog must be a dict"):
        log.load_state_dict([before])
    assert repr(log.state_dict()) == repr(before)
    for wrong in (None, True, "10"):
        with pytest.raises(TypeError, match="window must be a whole number"):
            gp.ClipLog(wrong)


def test_of_a_log_that_keeps_the_last_calls_these_are_drawn_at_their_numbers():
    above, below = logged(window=2).plot().axes
    for line in (*above.get_lines()[1:], *below.get_lines()):
        assert list(line.get_xdata()) == [3, 4]


def test_a_log_without_a_size_that_can_be_drawn_shows_its_bounds():
    log, parameter = gp.ClipLog(), nn.Parameter(torch.ones(2))
    for size in (0.0, math.inf):
        parameter.grad = torch.full((2,), size)
        gp.clip_by_norm_(parameter, 2.0, nonfinite="zero", log=log)
    sizes, bounds = log.plot().axes[0].get_lines()
    assert list(sizes.get_ydata()) == []
    assert list(bounds.get_ydata()) == [2.0, 2.0]
