"""Rows of layers that differ only in their number become one; all others stay by themselves."""

from gradprune.deploy.printed import folded


def test_layers_are_joined_by_their_numbers_and_only_by_them():
    rows = [{"tensor": name, "shape": "2 x 3"} for name in ("h.0.a", "h.1.a", "h.0.b", "conv1.w", "conv2.w", "3", "4")]
    assert folded(rows) == [
        {"tensor": "h.*.a", "times": 2, "shape": "2 x 3"},
        {"tensor": "h.0.b", "times": 1, "shape": "2 x 3"},
        {"tensor": "conv1.w", "times": 1, "shape": "2 x 3"},
        {"tensor": "conv2.w", "times": 1, "shape": "2 x 3"},
        {"tensor": "*", "times": 2, "shape": "2 x 3"},
    ]


def test_numbers_and_shares_become_spans_bytes_sums_and_floats_the_most():
    rows = [
        {"tensor": "h.0", "kept": "9.5%", "changed": 1200, "bytes": 600, "most": 0.5},
        {"tensor": "h.1", "kept": "10.5%", "changed": 7, "bytes": 600, "most": 2.0},
    ]
    (row,) = folded(rows, bytes_of=["bytes"])
    assert row == {
        "tensor": "h.*",
        "times": 2,
        "kept": "9.5 to 10.5%",
        "changed": "7 to 1,200",
        "bytes": "1.20 kB",
        "most": 2.0,
    }


def test_texts_that_differ_keep_rows_apart():
    rows = [{"tensor": "h.0", "reason": "is a bias"}, {"tensor": "h.1", "reason": ""}]
    assert [row["tensor"] for row in folded(rows)] == ["h.0", "h.1"]
    assert folded([]) == []
