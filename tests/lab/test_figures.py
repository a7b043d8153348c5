"""Can every figure be read: by eye, in light and in dark, and by those who do not see it?"""

import base64
import html
import re
from xml.etree import ElementTree

import hypothesis.strategies as st
import matplotlib as mpl
import numpy as np
import pytest
from bs4 import BeautifulSoup
from hypothesis import given, settings

from gradprune.lab import figures

ROOT_XLINK = '<svg xmlns:xlink="http://www.w3.org/1999/xlink" '


def luminance(colour):
    """Relative luminance as WCAG 2.1 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def drawing():
    """A figure with one of nearly everything that a chapter draws."""
    figure, axes = figures.new(columns=2)
    left, right = axes
    left.plot([0, 1, 2], [0.001, 0.125, 0.1875], "o-", label="dense")
    left.errorbar([0, 1], [0.1, 0.15], yerr=0.02, label="pruned", color=figures.COLOURS["pruned"])
    left.annotate("here", (1, 0.1), (0.5, 0.05), arrowprops={"arrowstyle": "->"})
    left.set_yticks([0.001, 0.125])
    left.set(title="Loss at p = 0.0005", xlabel="step", ylabel="loss")
    left.legend(title="model")
    right.bar([0, 1], [1, 2], hatch="/")
    right.boxplot([[1.0, 2.0, 3.0, 9.0]])
    right.fill_between([0, 1], [0, 0], [1, 2], alpha=0.3)
    figure.suptitle("Both")
    figure.colorbar(right.scatter([0, 1], [1, 2], c=[0, 1]))
    return figure


def test_every_colour_stands_out_from_both_pages():
    assert figures.PAGE_BACKGROUNDS == ("#ffffff", "#121212")
    cycle = [entry["color"] for entry in figures._STYLE["axes.prop_cycle"]]
    for colour in {*figures.COLOURS.values(), *cycle}:
        for page in figures.PAGE_BACKGROUNDS:
            assert contrast(colour, page) >= 3, (colour, page)


def test_the_contrast_is_measured_as_wcag_does():
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def test_every_figure_needs_words():
    figure, _ = figures.new()
    for alt in ("", "  \n"):
        for make in (figures.to_svg, lambda figure, alt: figures.show(figure, alt=alt)):
            with pytest.raises(ValueError, match="one sentence that says what it shows"):
                make(figure, alt)
    with pytest.raises(TypeError):
        figures.show(figure)


def ids(svg):
    return re.findall(r'\bid="([^"]+)"', svg)


def test_no_id_occurs_in_two_figures_and_every_reference_finds_its_own():
    pictures = [figures.to_svg(drawing(), "one"), figures.to_svg(drawing(), "two")]
    for picture in pictures:
        assert len(ids(picture)) == len(set(ids(picture)))
        references = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', picture)
        assert references
        assert {a or b for a, b in references} <= set(ids(picture))
    assert not set(ids(pictures[0])) & set(ids(pictures[1]))


def test_the_ink_is_the_pages_own():
    picture = figures.to_svg(drawing(), "one")
    assert "currentColor" in picture
    assert figures.INK not in picture
    fixed = {colour.lower() for colour in re.findall(r"(?:fill|stroke): *(#[0-9a-fA-F]{3,6}|black)", picture)}
    assert not fixed & {"#000000", "#000", "black", "#ffffff"}
    for element in re.findall(r"<text[^>]*>", picture):
        assert "currentColor" in element, element


def test_a_figure_is_well_formed_carries_no_date_and_styles_no_other():
    picture = figures.to_svg(drawing(), "one")
    tree = ElementTree.fromstring(picture.replace("<svg ", ROOT_XLINK, 1))
    assert tree.attrib["role"] == "img"
    assert tree[0].attrib["aria-hidden"] == "true"
    assert "width" not in tree[0].attrib
    for word in ("<metadata", "<style", "dc:date", "Matplotlib", "<!DOCTYPE", "<?xml"):
        assert word not in picture
    assert len(picture) < 60_000


def test_the_words_and_numbers_in_a_figure_are_those_that_were_given():
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", figures.to_svg(drawing(), "one"))
    assert {"0.001", "0.125", "Loss at p = 0.0005", "step", "loss", "dense", "model", "Both"} <= set(texts)


def test_the_paths_are_rounded_to_a_hundredth_of_a_point():
    picture = figures.to_svg(drawing(), "one")
    paths = " ".join(re.findall(r' d="([^"]*)"', picture))
    assert paths
    assert not re.search(r"\d\.\d{3}", paths)


def test_one_drawing_gives_the_same_bytes_each_time():
    assert figures.to_svg(drawing(), "one", prefix="a-") == figures.to_svg(drawing(), "one", prefix="a-")
    first, second = figures.to_png(drawing()), figures.to_png(drawing())
    assert first == second
    assert first.startswith(b"\x89PNG")
    assert b"Software" not in first
    assert b"matplotlib" not in first.lower()


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip))
def test_the_alternative_text_comes_through_whole_whatever_its_signs(alt):
    figure = figures.new()[0]
    label = re.match(r'<figure role="img" class="gp-figure" aria-label="([^"]*)">', figures.to_svg(figure, alt))
    assert label
    assert "<" not in label[1]
    assert html.unescape(label[1]) == alt


@pytest.mark.parametrize("mode", ["svg", None])
def test_a_figure_is_shown_as_svg_on_the_page_and_as_png_in_a_notebook_with_its_words(monkeypatch, mode):
    shown = []
    monkeypatch.setattr(figures, "display", lambda bundle, **options: shown.append((bundle, options)))
    monkeypatch.setenv("GRADPRUNE_FIGURES", "svg") if mode else monkeypatch.delenv("GRADPRUNE_FIGURES", raising=False)
    figures.show(figures.new()[0], alt="A < B")
    ((bundle, options),) = shown
    assert options["raw"]
    assert bundle["text/plain"] == "A < B"
    if mode:
        assert 'aria-label="A &lt; B"' in bundle["text/html"]
        assert "image/png" not in bundle
    else:
        assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
        assert options["metadata"]["image/png"]["alt"] == "A < B"
        assert "text/html" not in bundle


def test_pyplot_is_never_used_and_columns_give_as_many_axes():
    figures.new()
    assert not mpl._pylab_helpers.Gcf.figs
    assert figures.new(columns=3)[1].shape == (3,)
    assert figures.new(5, 2)[0].get_size_inches().tolist() == [5, 2]


def test_a_table_is_aligned_and_its_floats_have_two_digits(capsys):
    rows = [("tanh", 10, 0.123456), ("relu", 2, np.float32(1234.5)), ("x", np.int64(-7), -0.0), ("y", None, 1e-9)]
    figures.table(["net", "depth", "norm"], rows)
    assert capsys.readouterr().out.splitlines() == [
        "net   depth     norm",
        "tanh     10     0.12",
        "relu      2  1.2e+03",
        "x        -7        0",
        "y      None    1e-09",
    ]
    figures.table(["a"], [[np.float64(1 / 3)], [True]], digits=4)
    assert capsys.readouterr().out == "a\n0.3333\nTrue\n"


def test_in_the_page_a_table_is_html_with_the_same_texts(monkeypatch, capsys):
    monkeypatch.setenv("GRADPRUNE_FIGURES", "svg")
    shown = []
    monkeypatch.setattr(figures, "display", lambda bundle, raw: shown.append(bundle))
    figures.table(["a < b", "n"], [["x & y", 1], ["z", 0.123]])
    (bundle,) = shown
    assert bundle["text/plain"].splitlines() == ["a < b     n", "x & y     1", "z      0.12"]
    rows = BeautifulSoup(bundle["text/html"], "html.parser")("tr")
    assert [[cell.text for cell in row] for row in rows] == [["a < b", "n"], ["x & y", "1"], ["z", "0.12"]]
    assert [[cell["scope"] for cell in row("th")] for row in rows] == [["col", "col"], ["row"], ["row"]]
    assert capsys.readouterr().out == ""


def test_a_row_of_another_length_and_a_missing_header_are_refused_before_anything_is_printed(capsys):
    with pytest.raises(ValueError, match="a row of 1 cells under a header of 2"):
        figures.table(["a", "b"], [[1, 2], [3]])
    with pytest.raises(ValueError, match="needs a header"):
        figures.table([], [])
    assert capsys.readouterr().out == ""
    figures.table(["a", "bc"], [])
    assert capsys.readouterr().out == "a  bc\n"


def test_a_legend_lies_under_axes_that_keep_the_figures_width():
    boxes = {}
    for with_legend in (False, True):
        figure, axes = figures.new()
        for name in ("one", "two", "three", "four"):
            axes.plot([0, 1], [0, 1], label=name)
        axes.set_xlabel("step")
        if with_legend:
            figures.legend(axes)
        figure.canvas.draw()
        boxes[with_legend] = axes.get_tightbbox()
    box = figure.legends[0].get_window_extent()
    assert boxes[True].width == pytest.approx(boxes[False].width, rel=0.01)
    assert boxes[True].height == pytest.approx(boxes[False].height, rel=0.05)
    assert 0 <= box.y0 < box.y1 <= boxes[True].y0
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two", "three", "four"]


def test_what_the_figure_would_cut_off_is_refused_by_name():
    figure, axes = figures.new(2, 2)
    axes.plot([0, 1], label="short")
    figures.legend(axes)
    figures.to_png(figure)
    axes.set_title("a title that is far too long for two inches")
    with pytest.raises(ValueError, match="cuts 'a title that is far too long for two inches' off"):
        figures.to_png(figure)
    axes.set_title("")
    axes.plot([1, 0], label="a name in the legend that is far too long")
    figure.legends.clear()
    figures.legend(axes)
    with pytest.raises(ValueError, match=r"cuts '.*' off"):
        figures.to_png(figure)


def test_a_figure_holds_nothing_that_only_its_program_needed():
    figure, axes = figures.new()
    axes.plot([1, 2, 3], [1, 4, 2], marker="o")
    axes.plot([2], [3], marker="s")
    axes.set(xlabel="0.2 of  all", ylabel="$\\beta$")
    picture = figures.to_svg(figure, "one")
    assert len(re.findall("sans-serif", picture)) == 1
    assert "sans-serif" in re.search("<svg [^>]*>", picture)[0]
    assert not re.search(r"<g>|<g/>|<g id|\n|<!--|rotate\(-0", picture)
    assert picture.count("<g ") == picture.count("</g>") > 0
    assert ">0.2 of  all</text>" in picture
    assert re.search(r'<path d="M [\d. ]+L [\d. ]+"', picture)
    assert not re.search(r'<path d="M [\d. ]+"', picture)
    assert not re.search(r'style="[^"]*[:;] ', picture)
