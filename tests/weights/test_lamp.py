"""LAMP's counts are those of its exact scores, in however many cells and processes they are looked for."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradprune.core.select import keep_largest
from gradprune.weights import allocate, lamp
from gradprune.weights.lamp import Layer, lamp_counts

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)
LAYERS = st.lists(st.lists(st.integers(0, 6), max_size=12), min_size=1, max_size=4)


def exact(layers):
    """All (score, layer, place in its order) from the last to go to the first, by fractions."""
    found = []
    for at, values in enumerate(layers):
        outliving = Fraction(0)
        for place, (value, _) in enumerate(sorted(((v, i) for i, v in enumerate(values)), reverse=True)):
            outliving += value**2
            found.append((Fraction(value**2) / outliving if value else Fraction(0), at, -place))
    return sorted(found, reverse=True)


def told(layers, dtype, costs):
    return {str(at): Layer(torch.tensor(v, dtype=dtype), len(v), costs[at]) for at, v in enumerate(layers)}


@settings(max_examples=100, deadline=None)
@given(
    LAYERS, st.floats(0, 1), st.sampled_from(DTYPES), st.sampled_from([lamp.CELLS, (1, 1), (2**6, 2)]), st.booleans()
)
def test_as_many_stay_as_exact_scores_say(layers, share, dtype, cells, alike):
    costs = [3] * len(layers) if alike else [1 + at for at in range(len(layers))]
    ranked = exact(layers)
    held = [0]
    for _, at, _ in ranked:
        held.append(held[-1] + costs[at])
    wanted = round(share * held[-1])
    stay = min(range(len(held)), key=lambda k: (abs(held[k] - wanted), k))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lamp, "CELLS", cells)
        found = lamp_counts(told(layers, dtype, costs), wanted)
    assert list(found.values()) == [sum(at == i for _, at, _ in ranked[:stay]) for i in range(len(layers))]


@pytest.mark.parametrize("dtype", DTYPES[:4])
@pytest.mark.parametrize("cells", [lamp.CELLS, (64, 4)])
def test_large_layers_keep_what_ranks_highest_among_the_scores_themselves(dtype, cells, monkeypatch):
    monkeypatch.setattr(lamp, "CELLS", cells)
    torch.manual_seed(0)
    drawn = torch.randn(40_000), torch.randn(3000) * 1e-3, torch.randn(9000).exp(), torch.zeros(500), torch.ones(700)
    layers = {str(at): v.abs().to(dtype) for at, v in enumerate(drawn)}
    scores = list(allocate.lamp(layers).values())
    for k in (1, 5, 700, 20_000, 52_000, 53_200):
        wanted = [int(mask.sum()) for mask in keep_largest(scores, k)]
        assert list(lamp_counts({n: Layer(v, v.numel()) for n, v in layers.items()}, k).values()) == wanted


def test_what_is_barred_or_counted_elsewhere_counts_for_nothing():
    torch.manual_seed(2)
    layers = {name: torch.rand(n) for name, n in (("a", 900), ("b", 4000))}
    among = {name: torch.rand(v.shape) < 0.5 for name, v in layers.items()}
    alone = lamp_counts({n: Layer(v[among[n]], v.numel()) for n, v in layers.items()}, 700)
    high = {name: torch.where(among[name], v, 1e30) for name, v in layers.items()}
    assert lamp_counts({n: Layer(v, v.numel(), among=among[n]) for n, v in high.items()}, 700) == alone
    copies = {name: Layer(v * 3, v.numel(), counts=False) for name, v in layers.items()}
    assert lamp_counts(copies, 700) == {"a": 0, "b": 0}
    assert lamp_counts({n: Layer(v, 9, among=torch.zeros_like(v).bool()) for n, v in layers.items()}, 5) == {
        "a": 0,
        "b": 0,
    }


class _Unknown(Exception):
    """Raised where a process would wait for the others."""


def counted_with(layers, wanted, answers):
    """The counts once all answers of the others are known, or else what the process says last."""
    left = iter(answers)

    def reduced(numbers):
        answer = next(left, None)
        if answer is None:
            raise _Unknown(numbers)
        return answer

    try:
        return lamp_counts(layers, wanted, by="magnitude", total=reduced, most=reduced), None
    except _Unknown as said:
        return None, said.args[0]


def test_layers_in_parts_and_in_another_order_say_the_same():
    torch.manual_seed(1)
    layers = {name: torch.randn(n) for name, n in (("a", 1001), ("b", 5000), ("c", 2))}
    whole = lamp_counts({n: Layer(v, v.numel()) for n, v in layers.items()}, 1500, by="magnitude")
    parts = [{n: Layer(v[i::3].flip(0), v.numel()) for n, v in layers.items()} for i in range(3)]
    answers = []
    while True:
        counts, said = zip(*(counted_with(part, 1500, answers) for part in parts), strict=True)
        if said[0] is None:
            break
        stacked = torch.stack(said)
        answers.append(stacked.amax(0) if stacked.dtype == torch.int64 else stacked.sum(0))
    assert list(counts) == [whole] * 3
    assert sum(whole.values()) == 1500


def test_torchs_default_device_does_not_leak_into_the_counts():
    layers = {name: Layer(torch.rand(n), n) for name, n in (("a", 90), ("b", 400))}
    wanted = lamp_counts(layers, 70), lamp.lamp_scores(layers["a"].values, "a")
    torch.set_default_device("meta")
    try:
        found = lamp_counts(layers, 70), lamp.lamp_scores(layers["a"].values, "a")
    finally:
        torch.set_default_device(None)
    assert found[0] == wanted[0]
    assert torch.equal(found[1], wanted[1])
