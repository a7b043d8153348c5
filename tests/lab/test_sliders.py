"""Does a slider or a choice show, at each of its places, the picture and the words of that place?"""

import base64
import html
import re

import ipywidgets as widgets
import pytest

from gradprune.lab import figures, sliders


def draw(**setting):
    figure, axes = figures.new(5, 1)
    axes.set_title(" ".join(f"{name}-{value}" for name, value in setting.items()))
    return figure, f"This is {setting}."


def title(frame):
    return re.search(r"<text[^>]*>([^<]*-[^<]*)</text>", frame.value)[1]


def parts(explorer):
    *controls, stack = explorer.widget.children
    return controls, stack


@pytest.fixture
def links(monkeypatch):
    """The links that are made from control to stack, as pairs of widgets."""
    made = []
    real = widgets.jslink

    def spy(source, target):
        place = "value" if isinstance(source[0], widgets.IntSlider) else "index"
        assert (source[1], target[1]) == (place, "selected_index")
        made.append((source[0], target[0]))
        return real(source, target)

    monkeypatch.setattr(widgets, "jslink", spy)
    return made


def test_one_slider_shows_each_value_at_its_place_and_starts_in_the_middle(links):
    values = [0.1, 0.2, 0.3, 0.4]
    explorer = sliders.explore(draw, weight_scale=values)
    (control,), stack = parts(explorer)
    assert (control.min, control.max, control.value, control.step) == (0, 3, 2, 1)
    assert control.description == "weight scale"
    assert not control.disabled
    assert stack.selected_index == 2
    assert [title(frame) for frame in stack.children] == [f"weight_scale-{value}" for value in values]
    assert links == [(control, stack)]


def test_two_sliders_show_each_pair_of_values_at_its_place(links):
    explorer = sliders.explore(draw, depth=[1, 2, 3], act=["relu", "tanh"])
    (depth, act), stack = parts(explorer)
    assert (depth.value, act.index) == (1, 1)
    assert (depth.max, act.options) == (2, ("relu", "tanh"))
    assert [depth.description, act.description] == ["depth", "act"]
    shown = [[title(frame) for frame in row.children] for row in stack.children]
    assert shown == [[f"depth-{d} act-{a}" for a in ("relu", "tanh")] for d in (1, 2, 3)]
    assert (depth, stack) in links
    assert [target for source, target in links if source is act] == list(stack.children)
    assert len(links) == 4
    assert stack.selected_index == 1
    assert all(row.selected_index == 1 for row in stack.children)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["weight", "unit"], widgets.RadioButtons),
        (["relu", 2], widgets.RadioButtons),
        (["x" * 30, "y" * 31], widgets.Dropdown),
        ([0.1, 2], widgets.IntSlider),
    ],
)
def test_numbers_are_on_a_slider_and_words_to_be_chosen(links, values, kind):
    explorer = sliders.explore(draw, which=values)
    (control,), stack = parts(explorer)
    assert type(control) is kind
    assert control.description == "which"
    assert links == [(control, stack)]
    assert [title(frame) for frame in stack.children] == [f"which-{value}" for value in values]
    if kind is not widgets.IntSlider:
        assert control.options == tuple(map(str, values))
        assert control.index == stack.selected_index == 1


def test_each_value_is_drawn_once():
    calls = []

    def counted(**setting):
        calls.append(setting)
        return draw(**setting)

    sliders.explore(counted, a=[1, 2], b=[3, 4])
    assert calls == [{"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4}]


def test_the_words_stand_beside_the_picture_and_are_its_alternative_text():
    explorer = sliders.explore(lambda p: (draw(p=p)[0], f"At {p} it is 5."), p=[0.5])
    (frame,) = parts(explorer)[1].children
    assert '<p class="gp-words"><strong>p 0.5</strong> At 0.5 it is 5.</p>' in frame.value
    assert 'aria-label="At 0.5 it is 5."' in frame.value
    assert 'data-setting="p 0.5"' in frame.value


def test_words_with_signs_of_html_are_shown_as_they_are():
    nasty = "a <b> & \"c\" 'd' </figure><script>"
    explorer = sliders.explore(lambda name: (draw()[0], nasty), name=["<i> \" '"])
    (frame,) = parts(explorer)[1].children
    assert "<script>" not in frame.value
    assert "<i>" not in frame.value
    assert html.unescape(re.search(r'aria-label="([^"]*)"', frame.value)[1]) == nasty
    assert html.unescape(re.search(r"</strong> (.*?)</p>", frame.value)[1]) == nasty
    assert html.unescape(re.search(r'data-setting="([^"]*)"', frame.value)[1]) == "name <i> \" '"


def test_no_id_occurs_twice_among_the_pictures_of_a_slider():
    _, stack = parts(sliders.explore(draw, p=[1, 2, 3]))
    found = [name for frame in stack.children for name in re.findall(r'\bid="([^"]+)"', frame.value)]
    assert found
    assert len(found) == len(set(found))


def test_a_slider_of_one_value_shows_it_and_cannot_be_moved():
    (control,), stack = parts(sliders.explore(draw, p=[7]))
    assert control.disabled
    assert control.value == stack.selected_index == 0
    assert control.min < control.max  # a range of nothing is an error in the page
    assert [title(frame) for frame in stack.children] == ["p-7"]
    assert parts(sliders.explore(draw, p=["only"]))[0][0].disabled


def test_where_widgets_are_not_shown_there_is_the_middle_picture_and_all_the_words():
    explorer = sliders.explore(draw, p=[1, 2, 3])
    bundle, metadata = explorer._repr_mimebundle_()
    assert metadata["image/png"]["alt"].endswith("This is {'p': 2}.")
    assert base64.b64decode(bundle["image/png"]) == figures.to_png(draw(p=2)[0])
    assert bundle["text/plain"].splitlines() == [f"p = {p}: This is {{'p': {p}}}." for p in (1, 2, 3)]
    view = bundle["application/vnd.jupyter.widget-view+json"]
    assert view["model_id"] == explorer.widget.model_id
    assert sliders.explore(draw, a=[1], b=[2])._repr_mimebundle_()[0]["text/plain"].startswith("a, b = 1, 2: ")


def test_a_slider_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="one or two sliders, each a keyword with its values; 0 given"):
        sliders.explore(draw)
    with pytest.raises(ValueError, match=r"one or two sliders.*; 3 given"):
        sliders.explore(draw, a=[1], b=[1], c=[1])
    with pytest.raises(ValueError, match="slider 'b' has no values to show"):
        sliders.explore(draw, a=[1], b=[])
    with pytest.raises(ValueError, match=r"slider 'a' has a value twice: \[1, 2, 1\.0\]"):
        sliders.explore(draw, a=[1, 2, 1.0])
    for values in (3, iter([1, 2]), [[1], [2]]):
        with pytest.raises(TypeError, match="slider 'a' wants a list of numbers or words"):
            sliders.explore(draw, a=values)


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (lambda a, b: 1 / 0, "division by zero"),
        (lambda a: None, "unexpected keyword argument 'b'"),
        (lambda a, b: None, "cannot unpack"),
        (lambda a, b: (draw()[0], " "), "a figure needs alt text"),
        (lambda a, b: ("no figure", "words"), "draw returns a figure and a sentence, not 'no figure'"),
    ],
)
def test_a_drawing_that_fails_is_named_by_its_values(broken, why):
    with pytest.raises(RuntimeError, match=f"drawing the picture for a 1, b 2 failed: .*{why}") as caught:
        sliders.explore(broken, a=[1], b=[2])
    assert caught.value.__cause__ is not None
