"""Are the zoo's less usual networks, data and metrics what their docstrings say?"""

import copy
import math
import sys

import pytest
import torch
from torch import nn

import gradprune as gp
from gradprune import lab
from gradprune.lab.zoo import base, by_name, combined, generative, heads, phase, quantum, searched

# --------------------------------------------------------------------------------------------------------- circuits


def test_the_circuit_without_its_pruned_gates_gives_the_same_scores():
    torch.manual_seed(0)
    model = quantum.Circuit()
    x = quantum.few_digits(0).test.x[:5]
    masks = gp.prune(model, gp.rotation, sparsity=0.6)
    with torch.no_grad():
        assert torch.allclose(model(x), model.run(x, drop=True), atol=1e-5)
    kept = int(masks["angles"].sum())
    assert quantum.few_digits(0).details(model, "test") == {"rotations": kept}
    assert kept == round(0.4 * model.angles.numel())


def test_full_turns_change_no_score_so_the_rotation_score_may_drop_them():
    torch.manual_seed(0)
    model = quantum.Circuit()
    x = quantum.few_digits(0).test.x[:5]
    with torch.no_grad():
        before = model(x)
        model.angles[3, 1] += 2 * math.pi
        model.angles[4, 0] -= 4 * math.pi
        assert torch.allclose(model(x), before, atol=1e-5)
        model.angles[3, 1] = 2 * math.pi
        turned = model(x)
        model.angles[3, 1] = 0
        assert torch.allclose(model(x), turned, atol=1e-5)


def test_a_circuit_of_no_trained_rotation_is_worked_out_by_hand():
    """A ring of controlled NOTs permutes basis states; the inputs 0 and pi make one of them, up to a phase."""
    model = quantum.Circuit()
    with torch.no_grad():
        model.angles.zero_()
        x = torch.zeros(2, 2 * quantum.QUBITS)
        x[1, 0] = math.pi  # flips qubit 0
        bits = [0, 0, 0, 0], [1, 0, 0, 0]
        wanted = []
        for state in bits:
            state = list(state)
            for _ in range(quantum.LAYERS):
                for q in range(quantum.QUBITS):
                    state[(q + 1) % quantum.QUBITS] ^= state[q]
            wanted.append([quantum.SHARPNESS * (1 - 2 * b) for b in state])
        assert torch.allclose(model(x), torch.tensor(wanted), atol=1e-5)


def test_without_pennylane_the_circuit_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pennylane", None)
    quantum._simulator.cache_clear()
    with pytest.raises(ImportError, match="simulated by PennyLane: pip install pennylane"):
        quantum.Circuit()(torch.zeros(1, 2 * quantum.QUBITS))
    quantum._simulator.cache_clear()


def test_few_digits_are_principal_components_of_the_training_part_alone():
    task = quantum.few_digits(0)
    assert task.train.x.shape[1] == 2 * quantum.QUBITS
    assert set(task.test.y.tolist()) == set(range(quantum.CLASSES))
    assert torch.allclose(task.train.x.mean(0), torch.zeros(8), atol=1e-5)
    covariance = task.train.x.T @ task.train.x / len(task.train.x)
    assert torch.allclose(covariance, covariance.diag().diag(), atol=1e-4)
    assert float(task.train.x.std()) == pytest.approx(0.5, abs=1e-3)


# -------------------------------------------------------------------------------------------------------------- GAN


class Fixed(nn.Module):
    """Gives the same points whatever the noise."""

    def __init__(self, points):
        super().__init__()
        self.points = points

    def forward(self, noise):
        return self.points[: len(noise)]


def test_the_distance_between_samples_is_small_for_the_truth_and_known_for_a_shift():
    ring = generative.ring(0)
    generator = torch.Generator().manual_seed(77)
    truth = generative.real_points(generative.DRAWN, generator)
    near = ring.score(Fixed(truth), "test")
    assert near < 0.05
    assert ring.details(Fixed(truth), "test")["heaps hit"] == 1.0
    assert ring.details(Fixed(truth), "test")["points in a heap"] > 0.98
    _, real = ring._points(Fixed(truth), "test")
    shifted = ring.score(Fixed(real + torch.tensor([3.0, 0.0])), "test")
    assert shifted == pytest.approx(3 * 2 / math.pi, rel=1e-3)  # the mean of |cos| over directions
    one_heap = ring.details(Fixed(torch.tensor([1.0, 0.0]).expand(generative.DRAWN, 2)), "test")
    assert one_heap == {"heaps hit": 1 / 8, "points in a heap": 1.0}


@pytest.mark.parametrize("which", ["generator", "discriminator", "both"])
def test_each_adversary_is_trained_by_its_own_optimizer_and_only_what_was_asked_for_is_pruned(which):
    row = by_name(f"GAN, {which} pruned")
    task, model = row.task(0), base.network(row, 0)
    masks = base.prune(row, model, "magnitude", "global", 0.5, 0)
    sides = {name.split(".")[0] for name in masks}
    assert sides == ({"generator", "discriminator"} if which == "both" else {which})
    before = copy.deepcopy(model.state_dict())
    base.train(row, model, task, 3, rate=0.01, seed=0, masks=masks)
    changed = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"generator", "discriminator"}
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].any()


# ------------------------------------------------------------------------------------------------------------ heads


def test_two_heads_report_what_is_left_of_each_and_their_mean_is_the_score():
    (row,) = heads.ROWS
    task, model = row.task(0), base.network(row, 0)
    gp.prune(model, scope={"digit.weight": 0.5, "larger.weight": 1.0})
    with torch.no_grad():
        found = task.details(model, "test")
        assert found["digit kept"] == 0.5
        assert found["larger kept"] == 0.0
        assert task.score(model, "test") == pytest.approx((found["digit accuracy"] + found["larger accuracy"]) / 2)
        model.larger.bias.copy_(torch.tensor([1.0, 0.0]))
        y = task.loaded.test.y
        not_larger = torch.cat([y <= y.roll(-k) for k in (1, 2, 3, 4)])
        starved = task.details(model, "test")["larger accuracy"]
    assert starved == pytest.approx(float(not_larger.double().mean()))


# ----------------------------------------------------------------------------------------- phases and complex layers


class Answers(nn.Module):
    """Points in given directions."""

    def __init__(self, phases, length=1.0):
        super().__init__()
        self.points = length * phase.on_circle(phases)

    def forward(self, phases):
        return self.points


def test_the_circular_error_wraps_and_does_not_look_at_the_length():
    task = phase.series(0)
    y = task.test.y
    assert task.score(Answers(y, length=7.0), "test") == pytest.approx(0, abs=1e-6)
    assert task.score(Answers(y + 2 * math.pi - 0.3), "test") == pytest.approx(0.3, abs=1e-5)
    assert task.score(Answers(y + math.pi), "test") == pytest.approx(math.pi, abs=1e-3)
    guess = torch.rand(len(y), generator=torch.Generator().manual_seed(0)) * 2 * math.pi
    assert task.score(Answers(guess), "test") == pytest.approx(math.pi / 2, abs=0.15)


def test_the_phases_follow_the_circle_map():
    task = phase.series(0)
    x = task.train.x.double()
    assert float(x.abs().max()) <= math.pi + 1e-6
    step = x[:, 1:] - x[:, :-1] - 0.5 * x[:, :-1].sin()
    step = torch.atan2(step.sin(), step.cos())  # w and noise
    assert float(step.mean(1).abs().max()) < 1.1
    assert float((step - step.mean(1, keepdim=True)).std()) == pytest.approx(0.05, rel=0.1)


def test_squashing_keeps_the_phase_and_bounds_the_modulus():
    z = torch.randn(100, dtype=torch.complex64) * 10
    out = phase.squash(z)
    assert torch.allclose(out.angle(), z.angle(), atol=1e-5)
    assert float(out.abs().max()) < 1
    assert torch.equal(out.abs().argsort(), z.abs().argsort())


def test_turning_all_phases_turns_the_complex_network_s_answer_where_it_has_no_bias():
    torch.manual_seed(0)
    model = phase.PhaseComplex()
    for layer in model.net.layers:
        nn.init.zeros_(layer.bias)
    phases = torch.rand(4, phase.SHOWN) * 6
    before, after = (torch.view_as_complex(model(p).detach()) for p in (phases, phases + 0.7))
    assert torch.allclose(after, before * torch.polar(torch.ones(1), torch.tensor([0.7])), atol=1e-5)


def test_spectra_are_the_fourier_coefficients_of_the_signals():
    task, signals = phase.spectra(0), lab.data.load("mnist1d", seed=0)
    back = torch.fft.irfft(task.test.x, n=40)
    scale = float(signals.test.x.std() / back.std())
    assert torch.allclose(signals.test.x, scale * back, atol=1e-4)
    assert float(task.train.x.abs().mean()) == pytest.approx(1, abs=1e-4)


def test_the_combined_network_adds_and_the_mixed_one_weighs_its_experts():
    torch.manual_seed(0)
    phases = torch.rand(4, phase.SHOWN) * 6 - 3
    both = combined.Combined()
    assert torch.allclose(both(phases), both.recurrent(phases) + both.complex(phases))
    mixed = combined.Mixed()
    nn.init.zeros_(mixed.gate.weight)
    mixed.gate.bias.data = torch.tensor([100.0, 0.0])
    assert torch.allclose(mixed(phases), mixed.recurrent(phases), atol=1e-6)
    mixed.gate.bias.data = torch.tensor([0.0, 0.0])
    assert torch.allclose(mixed(phases), (mixed.recurrent(phases) + mixed.complex(phases)) / 2, atol=1e-6)


def test_the_nested_network_is_recurrent_and_complex_throughout():
    torch.manual_seed(0)
    model = combined.Nested()
    assert all(p.is_complex() for p in model.parameters())
    phases = torch.zeros(2, phase.SHOWN, requires_grad=True)
    (reached,) = torch.autograd.grad(model(phases).sum(), phases)
    assert bool((reached != 0).all())  # every step of the sequence matters at the last


# ----------------------------------------------------------------------------------------------------------- search


def test_the_row_of_the_search_is_the_best_design_that_was_measured():
    (found,) = lab.experiment.load("network_search")["rows"]
    best = max(found["tried"], key=lambda trial: trial["validation"])
    assert vars(searched.FOUND) == {name: value for name, value in best.items() if name != "validation"}
    assert found["best"] == best
    assert len(found["tried"]) == found["trials"] == lab.experiment.script("network_search").TRIALS


def test_a_search_proposes_the_designs_that_are_stored(monkeypatch):
    script = lab.experiment.script("network_search")
    (stored,) = lab.experiment.load("network_search")["rows"]
    values = iter(trial["validation"] for trial in stored["tried"] for _ in base.TUNING_SEEDS)
    monkeypatch.setattr(base, "train", lambda *_, **__: None)
    monkeypatch.setattr(base, "score", lambda *_: next(values))
    again = script.measure({"trials": 12})  # ten random ones, and two that go by what the others gave
    assert again["tried"] == stored["tried"][:12]
