"""Least squares for masks and the choice of masks, against slow and direct ways to the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradprune.recovery import solve
from gradprune.recovery.solve import Gram, System, eliminate, least_squares


def alike(samples, columns, seed=0):
    """Inputs that follow partly from each other and are not centred, as a network's are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return x @ mix + torch.randn(columns, generator=generator, dtype=torch.float64)


def system_of(x, damp=0.01):
    return System(x.T @ x, damp)


def direct(x, weights, masks, damp):
    """Each row by torch's own least squares, the damping as further samples, from zero change."""
    rows = [x, (damp * x.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)]
    wide, found = torch.cat(rows), torch.zeros_like(weights)
    for row, (w, mask) in enumerate(zip(weights, masks, strict=True)):
        if mask.any():
            found[row, mask] = torch.linalg.lstsq(wide[:, mask], (wide @ w).unsqueeze(1), driver="gelsd").solution[:, 0]
    return found


def error(x, change):
    return (x @ change.T).square().sum(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("samples", "columns"), [(1, 1), (7, 3), (500, 130), (33, 300)])
def test_the_sum_of_squares_is_that_of_all_inputs(samples, columns, dtype, monkeypatch):
    monkeypatch.setattr(solve, "AT_A_TIME", 1000)
    x = torch.randn(samples, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    gram = Gram(columns, x.device)
    for part in x.split(20):
        gram.add(part)
    wide = x.double()
    assert gram.samples == samples
    assert torch.allclose(gram.full(), wide.T @ wide, rtol=1e-12, atol=1e-12)


@settings(max_examples=60)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 14),
    seed=st.integers(0, 2**16),
    density=st.floats(0, 1),
    damp=st.sampled_from([0.0, 1e-4, 0.01, 1.0]),
    few=st.booleans(),
)
def test_the_least_squares_are_those_of_a_direct_solve(rows, columns, seed, density, damp, few):
    x = alike(50, columns, seed)
    weights = alike(rows, columns, seed + 1)
    masks = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    masks = masks[torch.arange(rows) % 3] if few else masks  # rows that share a mask
    found = least_squares(weights, system_of(x, damp), masks)
    wanted = direct(x, weights, masks, damp)
    assert not bool(found[~masks].any())
    assert float((found - wanted).norm()) <= 1e-4 * float(wanted.norm()) + 1e-12


@pytest.mark.parametrize("columns", [40, 150])
@pytest.mark.parametrize("density", [0.3, 0.8])
def test_large_systems_and_small_parts_of_them_give_the_same(columns, density, monkeypatch):
    x, weights = alike(400, columns), alike(30, columns, 1)
    masks = torch.rand(30, columns, generator=torch.Generator().manual_seed(0)) < density
    found = least_squares(weights, system_of(x), masks)
    monkeypatch.setattr(solve, "AT_A_TIME", 1)
    monkeypatch.setattr(solve, "_BATCHED", 1)
    assert torch.allclose(found, least_squares(weights, system_of(x), masks), rtol=1e-8, atol=1e-10)
    assert torch.allclose(found, direct(x, weights, masks, 0.01), rtol=1e-6, atol=1e-8)


@settings(max_examples=60)
@given(
    columns=st.integers(1, 20),
    samples=st.integers(1, 30),
    seed=st.integers(0, 2**16),
    density=st.floats(0, 1),
    damp=st.sampled_from([0.0, 1e-3, 0.1, 10.0]),
)
def test_the_answers_change_no_more_than_by_plain_masking(columns, samples, seed, density, damp):
    """Also without the damping, with which they are chosen, counted in: plain masking changes weights least."""
    x, weights = alike(samples, columns, seed), alike(6, columns, seed + 1)
    masks = torch.rand(6, columns, generator=torch.Generator().manual_seed(seed)) < density
    found = least_squares(weights, system_of(x, damp), masks)
    plain = error(x, weights * masks - weights)
    assert bool((error(x, found - weights) <= plain * (1 + 1e-6) + 1e-9).all())


def test_inputs_that_are_always_zero_leave_their_weights_and_those_of_others_alone():
    x, weights = alike(60, 10), alike(5, 10, 1)
    x[:, [2, 7]] = 0
    masks = torch.rand(5, 10, generator=torch.Generator().manual_seed(0)) < 0.6
    masks[:, 2] = True
    alive = [0, 1, 3, 4, 5, 6, 8, 9]
    for damp in (0.0, 0.01):
        system = system_of(x, damp)
        assert (system.inputs, system.raised) == (8, False)
        found = least_squares(weights, system, masks)
        assert torch.allclose(found[:, 2], weights[:, 2])
        without = system_of(x[:, alive], damp * 0.8)  # the mean is over all
        assert torch.allclose(found[:, alive], least_squares(weights[:, alive], without, masks[:, alive]))


def test_no_damping_of_inputs_that_follow_from_each_other_is_raised_to_the_least_that_can_be_solved():
    x = alike(60, 6)
    x[:, 5] = x[:, 0] + x[:, 1]
    assert system_of(x, 0.0).raised
    assert not system_of(x, 0.01).raised
    weights, masks = alike(4, 6, 1), torch.ones(4, 6, dtype=torch.bool)
    masks[:, 0] = False
    found = least_squares(weights, system_of(x, 0.0), masks)  # what 0 gave, 5 less 1 gives
    assert float(error(x, found - weights).max()) < 1e-6


def test_where_nothing_is_known_magnitudes_stay_as_they_are():
    weights, masks = alike(4, 6, 1), alike(4, 6, 2) > 0
    system = System(torch.zeros(6, 6, dtype=torch.float64), 0.01)
    assert torch.allclose(least_squares(weights, system, masks), weights * masks)


# ------------------------------------------------------------------------------------------ masks chosen with weights


def half_of_each_row(costs, start):
    keep = torch.zeros_like(costs, dtype=torch.bool)
    return keep.scatter(1, costs.topk(costs.shape[1] // 2, dim=1).indices, True)


def written_out(weights, h, width):
    """Optimal brain surgeon, one weight after another, from the inverse of what is left of H each time."""
    weights, keep = weights.clone(), torch.ones_like(weights, dtype=torch.bool)
    for start in range(0, len(h), width):
        block = range(start, min(start + width, len(h)))
        costs = [weights[:, j].square() / torch.linalg.inv(h[j:, j:])[0, 0] for j in block]
        keep[:, block.start : block.stop] = half_of_each_row(torch.stack(costs, dim=1), start)
        for j in block:
            inverse = torch.linalg.inv(h[j:, j:])
            for row in range(len(weights)):
                if not keep[row, j]:
                    weights[row, j:] -= weights[row, j] / inverse[0, 0] * inverse[0]
                    weights[row, j] = 0
    return weights, keep


@pytest.mark.parametrize("width", [2, 4, 8, 10, 64])
@pytest.mark.parametrize("columns", [1, 8, 20, 37])
def test_the_choice_is_that_of_optimal_brain_surgeon_written_out(width, columns):
    x, weights = alike(100, columns), alike(7, columns, 1)
    system = system_of(x)
    found, keep = eliminate(weights, system, half_of_each_row, width)
    wanted, kept = written_out(weights, system.h, width)
    assert torch.equal(keep, kept)
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-8)
    assert not bool(found[~keep].any())


def test_what_is_chosen_is_not_better_than_least_squares_for_the_same_masks():
    x, weights = alike(200, 32), alike(16, 32, 1)
    system = system_of(x)
    found, keep = eliminate(weights, system, half_of_each_row, 8)
    best = least_squares(weights, system, keep)

    def damped(change):
        return ((change @ system.h) * change).sum(1)

    assert bool((damped(best - weights) <= damped(found - weights) * (1 + 1e-9)).all())
    assert float(damped(best - weights).sum()) < float(damped(found - weights).sum())
