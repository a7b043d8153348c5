"""Is it found which channels a network couples, and what hides them?"""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gradprune.core.coupled import OUTPUTS, coupled
from gradprune.core.units import groups_of, place, reads, width, writes

pytest.importorskip("torch_pruning")
sys.path.append(str(Path(__file__).parents[1] / "deploy"))

from networks import IDS, IMAGES, Dense, Depthwise, Gated, Grouped, Residual, gpt2


def groups(model, x=IMAGES):
    """Layer -> of each of its channels what goes with it, as {(layer, side): channels}."""
    found = {}
    for group in coupled(model, x, "a test"):
        for unit in group.units:
            named = {(part.name, part.side): channels for part, channels in unit.items()}
            for part, channels in unit.items():
                if writes(part):
                    found.setdefault(part.name, {}).update(dict.fromkeys(channels, named))
    return found


def test_a_residual_sum_couples_what_is_added_and_the_norms_on_the_way():
    found = groups(Residual())
    assert found["stem.0"][3] == found["body.3"][3] == {
        ("stem.0", "out"): (3,),
        ("stem.1", "both"): (3,),
        ("body.0", "in"): (3,),
        ("body.3", "out"): (3,),
        ("body.4", "both"): (3,),
        ("head", "in"): (3,),
    }  # fmt: skip
    assert set(found["body.0"][0]) == {("body.0", "out"), ("body.1", "both"), ("body.3", "in")}


def test_a_depthwise_filter_is_both_sides_and_a_flattened_map_all_its_positions():
    found = groups(Depthwise())
    assert found["expand"][2][("depthwise", "both")] == (2,)
    assert found["project"][1][("head", "in")] == tuple(range(16, 32))


def test_concatenations_count_what_comes_from_the_input():
    found = groups(Dense())
    assert found["first"][2] == {("first", "out"): (2,), ("second", "in"): (5,), ("third", "in"): (10,)}
    assert found["second"][2] == {("second", "out"): (2,), ("third", "in"): (2,)}


def test_uneven_parts_of_a_split_are_followed_by_their_number():
    class Uneven(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 10), nn.Linear(3, 2), nn.Linear(7, 2)

        def forward(self, x):
            few, many = self.a(x).split([3, 7], dim=-1)
            return self.c(many.relu()) + self.b(few.tanh())

    found = groups(Uneven(), torch.randn(2, 5, 4))
    assert found["a"][2] == {("a", "out"): (2,), ("b", "in"): (2,)}
    assert found["a"][9] == {("a", "out"): (9,), ("c", "in"): (6,)}


def test_the_halves_of_a_gated_layer_are_one_unit():
    assert groups(Gated(), torch.randn(2, 5, 6))["up"][3] == {("up", "out"): (3, 23), ("down", "in"): (3,)}


def test_channels_of_grouped_convolutions_have_places():
    group = next(g for g in coupled(Grouped(), IMAGES, "a test") if any(p.name == "first" for p in g.parts))
    assert [place(group, unit) for unit in group.units] == [(c // 4,) for c in range(16)]
    part = next(part for part in group.parts if reads(part))
    assert (width(part), groups_of(part)) == (16, 4)


def test_outputs_are_named_as_what_stays():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 6)

        def forward(self, x):
            x = self.a(x)
            return x + self.b(x)

    (group,) = (g for g in coupled(Sum(), torch.randn(2, 4), "a test") if any(map(reads, g.parts)))
    assert group.stays == OUTPUTS


class Heads(nn.Module):
    """An attention whose layers are called so that its heads are known, or not."""

    def __init__(self, known, heads=2):
        super().__init__()
        self.num_heads, self.head_dim, self.known = heads, 8 // heads, known
        for name in ("q_proj", "k_proj", "v_proj", "o_proj") if known else ("alpha", "beta", "gamma", "delta"):
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, x):
        layers = list(self.children())
        q, k, v = (layer(x).view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2) for layer in layers[:3])
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return layers[3](x.transpose(1, 2).flatten(2))


def test_heads_are_units_where_the_layers_are_called_as_usual_and_stay_where_they_are_not():
    model, x = nn.Sequential(nn.Linear(8, 8), Heads(known=True)), torch.randn(2, 5, 8)
    heads = [group for group in coupled(model, x, "a test") if group.owner is not None]
    assert len(heads) == 1
    assert [list(unit.values()) for unit in heads[0].units] == [[tuple(range(4))] * 4, [tuple(range(4, 8))] * 4]
    assert heads[0].sizes == {"num_heads": 1}
    (only,) = (group for group in coupled(Heads(known=True, heads=1), x, "a test") if group.owner is not None)
    assert [list(unit.values()) for unit in only.units] == [[tuple(range(8))] * 4]  # and no channel of it by itself
    unknown = coupled(Heads(known=False), x, "a test")
    assert {group.stays for group in unknown if any(map(reads, group.parts))} == {
        "a view splits them, into heads or groups, in a way that is not followed"
    }


def test_the_model_is_left_as_it_was():
    model = Residual().train()
    model.stem[0].weight.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    coupled(model, IMAGES, "a test")
    assert model.training
    assert not model.stem[0].weight.requires_grad
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_queries_keys_and_values_of_one_layer_go_by_heads():
    model = gpt2()
    heads = [group for group in coupled(model, IDS, "a test") if group.owner is not None]
    width = model.config.n_embd
    for group, block in zip(heads, model.transformer.h, strict=True):
        assert group.owner is block.attn
        size = width // model.config.n_head
        for head, unit in enumerate(group.units):
            at = {part.module: sorted(places) for part, places in unit.items()}
            own = range(head * size, (head + 1) * size)
            assert at[block.attn.c_proj] == list(own)
            assert at[block.attn.c_attn] == [third * width + c for third in range(3) for c in own]
