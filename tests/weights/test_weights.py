"""Complex weights, packed ones and angles go through the same public functions as any other."""

import copy
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradprune as gp

COMPLEX = [torch.complex64, torch.complex128]


class ComplexNet(nn.Module):
    """Two complex layers with a smooth nonlinearity; real class scores."""

    def __init__(self, dtype=torch.complex64):
        super().__init__()
        self.first = nn.Linear(5, 7, dtype=dtype)
        self.second = nn.Linear(7, 3, dtype=dtype)

    def forward(self, z):
        h = self.first(z)
        return self.second(h / (1 + h.abs())).abs()


def complex_net(seed=0, dtype=torch.complex64):
    torch.manual_seed(seed)
    return ComplexNet(dtype)


def complex_batches(dtype=torch.complex64, count=2):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 5, dtype=dtype, generator=generator), torch.randint(0, 3, (4,), generator=generator))
        for _ in range(count)
    ]


def loss_of(model, dtype=torch.complex64):
    return sum(nn.functional.cross_entropy(model(z), y) for z, y in complex_batches(dtype))


# ------------------------------------------------------------------------------------------------- complex weights


@given(sparsity=st.floats(0, 1), seed=st.integers(0, 20), scope=st.sampled_from(["global", "layer", "erk", "lamp"]))
@settings(max_examples=30, deadline=None)
def test_complex_weights_go_by_modulus_and_each_counts_as_one(sparsity, seed, scope):
    model = complex_net(seed)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = gp.prune(model, sparsity=sparsity, scope=scope, min_keep=0)
    assert list(masks) == ["first.weight", "second.weight"]
    pruned = sum(int((~m).sum()) for m in masks.values())
    assert pruned == round(sparsity * 56)
    for name, mask in masks.items():
        now = model.get_parameter(name)
        assert torch.equal(now.detach(), torch.where(mask, before[name], 0))
        if mask.any() and not mask.all():
            assert before[name].abs()[mask].min() >= before[name].abs()[~mask].max()
    assert torch.equal(model.first.bias.detach(), before["first.bias"])


def test_real_and_complex_layers_are_ranked_together_by_modulus():
    torch.manual_seed(0)
    model = nn.ModuleDict({"real": nn.Linear(6, 6), "complex": nn.Linear(6, 6, dtype=torch.complex64)})
    sizes = torch.cat([p.detach().abs().flatten() for p in (model["real"].weight, model["complex"].weight)])
    masks = gp.prune(model, sparsity=0.5)
    kept = torch.cat([masks["real.weight"].flatten(), masks["complex.weight"].flatten()])
    assert sizes[kept].min() > sizes[~kept].max()
    assert int(kept.sum()) == 36


def test_a_threshold_and_every_granularity_look_at_the_modulus():
    for how in ({"threshold": 0.3}, {"granularity": "2:4"}, {"granularity": "channel", "sparsity": 0.5}):
        torch.manual_seed(0)
        model = nn.Linear(8, 4, dtype=torch.complex64)
        sizes = nn.Linear(8, 4)
        with torch.no_grad():
            sizes.weight.copy_(model.weight.abs())
        assert torch.equal(gp.prune(model, **how)["weight"], gp.prune(sizes, **how)["weight"])


def test_selection_ranks_complex_values_by_modulus_only_and_names_a_nan():
    z = torch.tensor([3 + 4j, 1j, -2 + 0j])
    assert gp.kth_smallest([z], 3, by="magnitude") == 5
    assert [m.tolist() for m in gp.keep_largest([z], 2, by="magnitude")] == [[True, False, True]]
    with pytest.raises(ValueError, match=r"complex64.*by='magnitude' ranks complex ones by their modulus"):
        gp.kth_smallest([z], 1)
    hidden = torch.tensor([complex(math.inf, math.nan), 1j])
    with pytest.raises(ValueError, match="'z' contains NaN"):
        gp.keep_largest({"z": hidden}, 1, by="magnitude")


def test_a_complex_score_is_an_error_before_anything_is_changed():
    model = complex_net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"score of 'first.weight' is complex, which has no order"):
        gp.prune(model, lambda m: {n: p.detach() for n, p in m.named_parameters()}, sparsity=0.5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


OPTIMIZERS = {
    "SGD": {"momentum": 0.9, "weight_decay": 0.01},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "NAdam": {},
    "RAdam": {},
    "Adamax": {},
    "Adadelta": {},
    "Adagrad": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Rprop": {},
    "ASGD": {},
    "LBFGS": {"max_iter": 3},
}


@pytest.mark.parametrize("dtype", COMPLEX)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_complex_weights_stay_zero_under_every_optimizer_that_takes_them(name, dtype):
    model = complex_net(dtype=dtype)
    optimizer = getattr(torch.optim, name)(model.parameters(), **{"lr": 0.01} | OPTIMIZERS[name])

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, dtype)
        loss.backward()
        return loss

    optimizer.step(closure)
    masks = gp.prune(model, sparsity=0.7)
    before = model.first.weight.detach().clone()
    with masks.hold(optimizer):
        for _ in range(3):
            optimizer.step(closure)
            assert all(bool((model.get_parameter(n)[~m] == 0).all()) for n, m in masks.items())
    assert not torch.equal(before, model.first.weight.detach())
    for parameter, state in optimizer.state.items():
        if parameter is model.first.weight and name != "LBFGS":
            moments = [v for v in state.values() if isinstance(v, torch.Tensor) and v.shape == parameter.shape]
            assert moments
            assert all(bool((v[~masks["first.weight"]] == 0).all()) for v in moments)


@pytest.mark.parametrize("dtype", COMPLEX)
def test_infinities_and_conjugate_views_become_plus_zero(dtype):
    model = complex_net(dtype=dtype)
    with torch.no_grad():
        model.first.weight[0, 0] = complex(-math.inf, math.nan)
        model.first.weight[0, 1] = complex(-1.0, -1.0)
    mask = torch.ones(7, 5, dtype=torch.bool)
    mask[0] = False
    gp.Masks({"first.weight": mask}).apply_(model)
    parts = torch.view_as_real(model.first.weight.detach())
    assert bool((parts[0] == 0).all())
    assert not parts[0].signbit().any()
    model.first.weight.grad = torch.randn(7, 5, dtype=dtype).conj()
    gp.Masks({"first.weight": mask}).mask_gradients_(model)
    assert model.first.weight.grad.is_conj()
    assert bool((model.first.weight.grad[0] == 0).all())
    assert bool((model.first.weight.grad[1:] != 0).all())


def as_pairs(model):
    """The same network with its complex weights as pairs of real numbers: an independent view of every score."""
    values = [p.detach() for p in model.parameters()]
    flat = torch.cat([torch.view_as_real(v).reshape(-1) for v in values])

    def at(vector, inputs):
        parts = vector.split([2 * v.numel() for v in values])
        state = {
            name: torch.view_as_complex(part.view(*v.shape, 2))
            for (name, v), part in zip(model.named_parameters(), parts, strict=True)
        }
        return torch.func.functional_call(model, state, (inputs,))

    def unpack(vector):
        return [part.view(-1, 2) for part in vector.split([2 * v.numel() for v in values])]

    return flat, at, unpack


def test_scores_of_complex_weights_are_those_of_their_two_parts_together():
    dtype = torch.complex128
    model, data = complex_net(dtype=dtype), complex_batches(dtype)
    flat, at, unpack = as_pairs(model)
    loss = nn.functional.cross_entropy

    def mean(vector):
        return sum(loss(at(vector, z), y) for z, y in data) / len(data)

    g = torch.autograd.functional.jacobian(mean, flat)
    hessian = torch.autograd.functional.hessian(mean, flat)
    both = [(w * d).sum(1) for w, d in zip(unpack(flat), unpack(g), strict=True)]
    hg = [(w * h).sum(1) for w, h in zip(unpack(flat), unpack(hessian @ g), strict=True)]
    wanted = {
        gp.gradient: [d.norm(dim=1) for d in unpack(g)],
        gp.taylor: [b.abs() for b in both],
        gp.snip: [b.abs() / sum(x.abs().sum() for x in both) for b in both],
        gp.grasp: hg,
        gp.movement: [-len(data) * b for b in both],
    }
    for score, parts in wanted.items():
        found = score(model, data, loss)
        for value, part in zip(found.values(), parts, strict=True):
            assert value.dtype == torch.float64
            assert torch.allclose(value.flatten(), part, rtol=1e-9, atol=1e-12), score
    samples = [(z[i : i + 1], y[i : i + 1]) for z, y in data for i in range(len(y))]
    squares = [torch.zeros(len(b), dtype=torch.float64) for b in both]
    for z, y in samples:
        one = torch.autograd.functional.jacobian(lambda v, z=z, y=y: loss(at(v, z), y), flat)
        for total, w, d in zip(squares, unpack(flat), unpack(one), strict=True):
            total += (w * d).sum(1).square() / (2 * len(samples))
    for value, part in zip(gp.fisher(model, data, loss).values(), squares, strict=True):
        assert torch.allclose(value.flatten(), part, rtol=1e-9, atol=1e-14)


def test_the_taylor_score_predicts_what_zeroing_one_small_complex_weight_costs():
    dtype = torch.complex128
    model, data = complex_net(dtype=dtype), complex_batches(dtype, count=1)
    with torch.no_grad():
        model.first.weight[2, 3] *= 1e-5
    predicted = gp.taylor(model, data, nn.functional.cross_entropy)["first.weight"][2, 3]
    before = nn.functional.cross_entropy(model(data[0][0]), data[0][1])
    with torch.no_grad():
        model.first.weight[2, 3] = 0
    after = nn.functional.cross_entropy(model(data[0][0]), data[0][1])
    assert float((after - before).detach().abs()) == pytest.approx(float(predicted), rel=1e-3)


def test_scores_without_a_loss_take_complex_weights_and_inputs():
    model, data = complex_net(), complex_batches()
    assert torch.equal(gp.magnitude(model)["first.weight"], model.first.weight.detach().abs())
    assert gp.random(model)["first.weight"].dtype == torch.float32
    norm = torch.cat([z for z, _ in data]).abs().square().sum(0).sqrt()
    assert torch.allclose(gp.activation(model, data)["first.weight"], model.first.weight.detach().abs() * norm)
    flow = gp.synflow(nn.Sequential(model.first, model.second), data[0][0])
    through = model.second.weight.detach().abs().sum(0).double()
    assert torch.allclose(flow["0.weight"], model.first.weight.detach().abs() * through.unsqueeze(1) * 4)
    with pytest.raises(ValueError, match="loss must be real"):
        gp.taylor(model, data, lambda out, _: out.sum() * 1j)


def test_a_pruner_and_regrowth_take_complex_weights():
    model = complex_net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    pruner = gp.Pruner(model, optimizer, gp.Linear(0.6, 0, 6), regrow=gp.Regrow(gp.gradient, 0.3, every=4))
    for _ in range(8):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert pruner.masks.sparsity == pytest.approx(0.6, abs=0.01)
    assert sum(sum(event.regrown.values()) for event in pruner.events) > 0
    assert all(bool((model.get_parameter(n)[~m] == 0).all()) for n, m in pruner.masks.items())


@pytest.mark.parametrize("dtype", COMPLEX)
def test_iterate_goes_on_from_a_checkpoint_of_complex_weights(tmp_path, dtype):
    def train(model, work):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        work.hold(optimizer)
        for _ in work.steps:
            optimizer.zero_grad()
            loss_of(model, dtype).backward()
            optimizer.step()

    def go(path, rounds):
        model = complex_net(dtype=dtype)
        stop = (lambda history: len(history.entries) > rounds) if rounds else None
        schedule = gp.Geometric(0.5, 1, 2)
        gp.iterate(model, train, schedule, steps=4, rewind="weights", rewind_to=1, checkpoint=path, stop=stop)
        return model

    straight = go(tmp_path / "straight", None)
    go(tmp_path / "stopped", 1)
    resumed = go(tmp_path / "stopped", None)
    assert straight.first.weight.dtype == dtype
    for ours, theirs in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", COMPLEX)
def test_the_report_counts_a_complex_number_once_its_bytes_twice_and_its_products_four_times(dtype):
    model = nn.Linear(6, 10, bias=False, dtype=dtype)
    gp.prune(model, sparsity=0.75)
    report = gp.report(model, torch.randn(3, 6, dtype=dtype))
    row, size = report.total, torch.empty(0, dtype=dtype).element_size()
    assert (row.parameters, row.nonzeros) == (60, 15)
    assert row.bytes_dense == 60 * size
    assert row.bytes_bitmask == 8 + 15 * size
    assert row.bytes_csr == 15 * (size + 4) + 11 * 4
    assert (row.flops, row.effective_flops) == (8 * 3 * 60, 8 * 3 * 15)


def test_saved_masks_of_complex_weights_come_back(tmp_path):
    masks = gp.prune(complex_net(), sparsity=0.5)
    masks.save(tmp_path / "masks.safetensors")
    other = complex_net()
    gp.Masks.load(tmp_path / "masks.safetensors").apply_(other)
    assert bool((other.first.weight[~masks["first.weight"]] == 0).all())


# -------------------------------------------------------------------------- packed recurrent and attention weights


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_layers_report_each_product_and_each_matrix_density(kind, bidirectional):
    torch.manual_seed(0)
    model = kind(5, 6, num_layers=2, bidirectional=bidirectional, batch_first=True)
    weights = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    gp.prune(model, scope={"weight_ih_l0": 0.5, "weight_hh_l0": 0.9})
    row = gp.report(model, torch.randn(3, 4, 5)).total
    assert row.flops == 2 * 3 * 4 * sum(p.numel() for p in weights.values())
    assert row.effective_flops == 2 * 3 * 4 * sum(int(p.count_nonzero()) for p in weights.values())


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_packed_recurrent_layer_computes_with_its_pruned_weights_and_stays_pruned(kind):
    torch.manual_seed(0)
    model = kind(5, 6, batch_first=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    masks = gp.prune(model, sparsity=0.6)
    masks.hold(optimizer)
    x = torch.randn(3, 4, 5)
    for _ in range(3):
        optimizer.zero_grad()
        model(x)[0].square().sum().backward()
        optimizer.step()
    cell = getattr(nn, f"{kind.__name__}Cell")(5, 6)
    with torch.no_grad():
        for name, p in cell.named_parameters():
            packed = model.get_parameter(f"{name}_l0")
            mask = masks.get(f"{name}_l0", torch.ones_like(packed, dtype=torch.bool))
            p.copy_(torch.where(mask, packed, 0))
        state = None
        for step in x.unbind(1):
            state = cell(step, state)
        last = state[0] if isinstance(state, tuple) else state
        for mode in (model.train(), model.eval()):
            assert torch.allclose(mode(x)[0][:, -1], last, atol=1e-6)


def test_scores_reach_packed_weights():
    torch.manual_seed(0)

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.LSTM(3, 4, batch_first=True)

        def forward(self, x):
            return self.cell(x)[0][:, -1]

    model, data = Last(), [(torch.randn(5, 6, 3), torch.randint(0, 4, (5,)))]
    loss = nn.functional.cross_entropy
    for score in (partial(gp.movement, lr=0.1), gp.taylor, gp.fisher, gp.grasp):
        found = score(model, batches=data, loss=loss)
        assert all(bool((found[f"cell.weight_{which}_l0"] != 0).any()) for which in ("ih", "hh"))
    assert bool((gp.synflow(model, data[0][0])["cell.weight_hh_l0"] > 0).all())


class Attention(nn.Module):
    """One attention layer of a sequence on itself."""

    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attend(x, x, x, need_weights=False)[0]


def by_hand(layer, x):
    q, k, v = (x @ w.T + b for w, b in zip(layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), strict=True))
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
    attended = (q @ k.mT / 2).softmax(-1) @ v
    return attended.transpose(1, 2).flatten(2) @ layer.out_proj.weight.T + layer.out_proj.bias


@pytest.mark.parametrize("fast", [False, True])
def test_attention_computes_with_its_pruned_joint_projection_on_the_fast_path_too(fast):
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(3, 5, 8)
    gp.prune(model, sparsity=0.7)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        with torch.no_grad():
            assert torch.allclose(model(x), by_hand(model.attend, x), atol=1e-6)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_the_report_gives_attention_its_projections_densities_and_its_own_products_whole():
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(3, 5, 8)
    gp.prune(model, scope={"attend.in_proj_weight": 0.75, "attend.out_proj.weight": 0.5})
    for needed in (model, nn.Sequential(model)):
        joint, out = gp.report(needed, x).rows
        products = 2 * 2 * 3 * 5 * 5 * 8
        assert joint.flops == 2 * 15 * 24 * 8 + products
        assert joint.effective_flops == joint.flops - 2 * 15 * 144
        assert (out.flops, out.effective_flops) == (2 * 15 * 64, 2 * 15 * 32)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cudnn.enabled
    assert torch.backends.mkldnn.enabled


def test_a_transformer_layer_is_counted_whole():
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(3, 5, 8)
    weights = sum(p.numel() for p in layer.parameters() if p.dim() > 1)
    assert gp.report(layer, x).total.flops == 2 * 15 * weights + 2 * 2 * 3 * 5 * 5 * 8


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.LSTM(4, 6), "'weight_ih_l0' is no unit: each unit of a recurrent layer is spread over"),
        (nn.GRUCell(4, 6), "'weight_ih' is no unit"),
        (nn.RNN(4, 6), "Exclude both, or prune single weights"),
        (nn.MultiheadAttention(8, 2), r"'in_proj_weight' is no unit: it packs .* granularity \(4,\)"),
    ],
)
def test_channels_of_packed_weights_are_an_error_before_anything_is_changed(model, words):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words):
        gp.prune(model, sparsity=0.5, granularity="channel")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_one_head_s_share_of_a_joint_projection_goes_as_a_whole():
    torch.manual_seed(0)
    model = Attention()
    masks = gp.prune(model, sparsity=0.5, granularity=(4,), include="attend.in_proj_weight")
    tiles = masks["attend.in_proj_weight"].view(6, 4 * 8)
    assert bool((tiles.all(1) | ~tiles.any(1)).all())
    assert int(tiles.any(1).sum()) == 3


def test_a_recurrent_net_s_head_can_lose_channels_when_its_cell_is_excluded():
    model = nn.ModuleDict({"cell": nn.GRU(4, 6), "head": nn.Linear(6, 4)})
    masks = gp.prune(model, sparsity=0.5, granularity="channel", exclude="cell.*")
    assert int(masks["head.weight"].any(1).sum()) == 2


# ----------------------------------------------------------------------------------------------------------- angles


def rotation_x(angle):
    """exp(-i angle X / 2), the matrix of the gate."""
    half = torch.as_tensor(angle, dtype=torch.float64) / 2
    c, s = torch.cos(half).to(torch.complex128), -1j * torch.sin(half).to(torch.complex128)
    return torch.stack([torch.stack([c, s]), torch.stack([s, c])])


@given(angle=st.floats(-20, 20), turns=st.integers(-3, 3))
@settings(max_examples=60, deadline=None)
def test_a_rotation_s_score_is_how_far_its_gate_is_from_the_identity(angle, turns):
    model = nn.Module()
    model.angles = nn.Parameter(torch.tensor([[angle, angle + 2 * math.pi * turns]], dtype=torch.float64))
    score = gp.rotation(model)["angles"][0]
    assert torch.allclose(score[0], score[1], atol=1e-9)
    assert 0 <= float(score[0]) <= math.pi
    # |trace| / 2 = |cos(angle / 2)| is 1 for the identity, whatever its sign.
    overlap = rotation_x(angle).diagonal().sum().abs() / 2
    assert float(overlap) == pytest.approx(math.cos(float(score[0]) / 2), abs=1e-9)


def test_angles_near_a_full_turn_go_first_and_become_zero():
    model = nn.Module()
    model.angles = nn.Parameter(torch.tensor([[6.2, 0.5, -3.0, -12.6]]))
    assert gp.prune(copy.deepcopy(model), sparsity=0.5)["angles"].tolist() == [[True, False, False, True]]
    masks = gp.prune(model, gp.rotation, sparsity=0.5)
    assert masks["angles"].tolist() == [[False, True, True, False]]
    assert model.angles.tolist() == [[0.0, 0.5, -3.0, 0.0]]


def test_a_controlled_rotation_needs_two_turns():
    model = nn.Module()
    model.angles = nn.Parameter(torch.tensor([[2 * math.pi, 4 * math.pi]]))
    assert torch.allclose(gp.rotation(model)["angles"], torch.zeros(1, 2), atol=1e-5)
    assert torch.allclose(
        gp.rotation(model, period=4 * math.pi)["angles"], torch.tensor([[2 * math.pi, 0.0]]), atol=1e-5
    )


def test_rotation_refuses_a_period_that_is_none_and_has_no_score_for_complex_weights():
    for period in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="period must be positive and finite"):
            gp.rotation(nn.Linear(2, 2), period)
    with pytest.raises(ValueError, match=r"no value for 'first\.weight'"):
        gp.prune(complex_net(), gp.rotation, sparsity=0.5)
