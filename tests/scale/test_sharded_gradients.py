"""Gradients on DTensors: what one process makes of them, over several."""

import itertools
import math
import tempfile

import group
import pytest
import torch
import torch.distributed as dist
from shards import LAYOUTS, bits, cases_for, chain, in_quiet, local, made, mesh_of, part, sharded, whole
from torch import nn

import gradprune as gp

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NORMS = {
    "norm": lambda p: gp.clip_by_norm_(p, 0.5),
    "most": lambda p: gp.clip_by_norm_(p, 0.5, norm_type=math.inf),
    "sum": lambda p: gp.clip_by_norm_(p, 0.5, norm_type=1),
    "only measured": lambda p: gp.clip_by_norm_(p, math.inf, norm_type=3),
    "auto": lambda p: gp.AutoClip(50)(p),
}
UNITS = {
    "units": lambda p: gp.clip_adaptive_(p, 0.7),
    "most units": lambda p: gp.clip_adaptive_(p, 0.01, eps=1.0),
}
EXACT = {
    "value": lambda p: gp.clip_by_value_(p, 0.4),
    "threshold": lambda p: gp.threshold_gradients_(p, 0.4),
    "ratio": lambda p: gp.threshold_gradients_(p, ratio=1.1),
    "top": lambda p: gp.keep_top_gradients_(p, 0.3),
    "top of layers": lambda p: gp.keep_top_gradients_(p, 0.21, scope="layer"),
    "none": lambda p: gp.keep_top_gradients_(p, 0.0),
}


def pair(mesh, how, seed, sizes=(5, 7, 1, 8, 3), dtype=torch.float32, values="normal"):
    """A model and one that is spread over all ranks, with equal gradients."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    alone, spread = chain(seed, sizes, dtype), sharded(chain(seed, sizes, dtype), how, mesh)
    for one, other in zip(alone.parameters(), spread.parameters(), strict=True):
        one.grad = made(values, one.shape).to(dtype)
        other.grad = one.grad.clone()
        if isinstance(other, DTensor):
            other.grad = distribute_tensor(one.grad.clone(), mesh, other.placements)
    return alone, spread


def gradients(model):
    return [whole(p.grad) for p in model.parameters()]


def same_on_all(value):
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, value)
    assert len(set(told)) == 1, told


def they_are_those_of_one_process(rank, ranks):
    mesh = mesh_of(ranks)
    for seed, (how, values) in cases_for(
        enumerate(itertools.product(LAYOUTS, ("normal", "ties", "zeros", "equal"))), ranks
    ):
        dtype = DTYPES[(seed + seed // 4) % 4]
        for name, call in EXACT.items():
            alone, spread = pair(mesh, how, seed, dtype=dtype, values=values)
            assert in_quiet(call, spread) == in_quiet(call, alone), (how, dtype, values, name)
            for p, q in zip(spread.parameters(), alone.parameters(), strict=True):
                assert torch.equal(bits(local(p.grad)), bits(part(q.grad, p.grad).clone())), (how, dtype, values, name)
        for name, call in NORMS.items() if values in ("normal", "zeros") else ():
            alone, spread = pair(mesh, how, seed, dtype=dtype, values=values)
            norm, wanted = call(list(spread.parameters())), call(alone)
            same_on_all(float(norm))
            assert norm.dtype == wanted.dtype
            assert float(norm) == pytest.approx(float(wanted), rel=1e-6), (how, dtype, values, name)
            check_near(gradients(spread), gradients(alone), dtype, (how, dtype, values, name))


def units_are_bounded_as_by_one_process(rank, ranks):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    mesh = mesh_of(ranks)
    for seed, (how, values) in cases_for(enumerate(itertools.product(LAYOUTS, ("normal", "zeros", "ties"))), ranks):
        dtype = DTYPES[seed % 4]
        for name, call in UNITS.items():
            alone, spread = pair(mesh, how, seed, dtype=dtype, values=values)
            call(alone)
            call(spread)
            check_near(gradients(spread), gradients(alone), dtype, (how, dtype, values, name))
    for size in (1.0, 1e30, 1e-30):
        log, wanted = gp.ClipLog(), gp.ClipLog()
        alone, spread = layers(), fully_shard(layers(), mesh=mesh)
        for one, other in zip(alone.parameters(), spread.parameters(), strict=True):
            one.grad = made("normal", one.shape) * size
            other.grad = distribute_tensor(one.grad.clone(), mesh, other.placements)
        gp.clip_adaptive_(alone, 0.6 * size, log=wanted)
        gp.clip_adaptive_(spread, 0.6 * size, log=log)
        check_near(gradients(spread), gradients(alone), torch.float32, size)
        for found, other in zip(log._rows[0], wanted._rows[0], strict=True):
            assert found == pytest.approx(other, rel=1e-5)
        assert 0 < log.shares[0] < 1
    _, spread = pair(mesh, "columns", 1)
    if rank == ranks - 1:
        local(spread[0].weight).view(-1)[-1] = math.inf
    refused(rank, ranks, UNITS["units"], spread, ValueError, "the weights of '0.weight' are not finite")


def layers():
    """With units on the second axis, in groups; a matrix, vectors, a filter."""
    torch.manual_seed(0)
    return nn.Sequential(nn.ConvTranspose2d(6, 8, 3, groups=2), nn.Conv2d(8, 5, 2), nn.Linear(7, 3), nn.LayerNorm(3))


def check_near(found, wanted, dtype, said):
    for some, other in zip(found, wanted, strict=True):
        near = 2e-6 + 2 * torch.finfo(dtype).eps
        assert torch.allclose(some.double(), other.double(), rtol=near, atol=0), said


def norms_are_right_beyond_the_range_of_squares(rank, ranks):
    mesh = mesh_of(ranks)
    for how, size in itertools.product(("fsdp", "mixed"), (1.0, 1e30, 1e-30)):
        alone, spread = pair(mesh, how, 3, (50, 70, 20, 30, 2))
        for p in (*alone.parameters(), *spread.parameters()):
            local(p.grad).mul_(size)
        exact = {name: float(p.grad.double().norm()) for name, p in alone.named_parameters()}
        assert gp.gradient_norms(spread) == pytest.approx(exact, rel=1e-6)
        assert list(gp.gradient_norms(spread)) == list(gp.gradient_norms(alone))
        norm = math.sqrt(sum(one**2 for one in exact.values()))
        assert float(gp.clip_by_norm_(spread, size)) == pytest.approx(norm, rel=1e-6)
        after = torch.cat([g.double().view(-1) for g in gradients(spread)]).norm()
        assert float(after) == pytest.approx(size, rel=2e-6)
    alone, spread = pair(mesh, "fsdp", 3, dtype=torch.float64)
    for model in (alone, spread):
        for p in model.parameters():
            local(p.grad).fill_(1e308)
        with pytest.raises(ValueError, match="beyond float64"):
            gp.clip_by_norm_(model, 1.0)


def a_step_of_fsdp_is_clipped_as_torch_does(rank, ranks):
    for seed in range(2):
        model, other = (sharded(chain(seed, (5, 7, 6)), "fsdp", mesh_of(ranks)) for _ in range(2))
        torch.manual_seed(rank)
        x = torch.randn(4, 5)
        for one in (model, other):
            one(x).square().sum().backward()
        wanted = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1).full_tensor()
        assert float(gp.clip_by_norm_(model, 0.1)) == pytest.approx(float(wanted), rel=1e-6)
        assert all(torch.allclose(a, b, rtol=2e-6) for a, b in zip(gradients(model), gradients(other), strict=True))


def a_log_may_be_kept_on_one_rank_alone(rank, ranks):
    for call in (gp.clip_by_value_, gp.clip_by_norm_):
        alone, spread = pair(mesh_of(ranks), "mixed", 1)
        log, wanted = gp.ClipLog(), gp.ClipLog()
        call(alone, 0.5, log=wanted)
        call(spread, 0.5, log=log if rank == 0 else None)
        if rank == 0:
            assert log.calls == wanted.calls == 1
            for found, other in zip(log._rows[0], wanted._rows[0], strict=True):
                assert found == pytest.approx(other, rel=1e-6)
            assert log.shares[0] > 0


def refused(rank, ranks, call, model, kind, match):
    """All ranks raise the same, and nothing is written."""
    before = [None if p.grad is None else bits(local(p.grad)).clone() for p in model.parameters()]
    with pytest.raises(kind, match=match) as raised:
        call(model)
    same_on_all(str(raised.value))
    for p, old in zip(model.parameters(), before, strict=True):
        assert old is None or torch.equal(bits(local(p.grad)), old)


def what_is_not_finite_on_one_rank_is_so_on_all(rank, ranks):
    mesh = mesh_of(ranks)
    calls = {
        "norm": lambda p, **a: gp.clip_by_norm_(p, 0.5, **a),
        "value": lambda p, **a: gp.clip_by_value_(p, 0.5, **a),
        "units": lambda p, **a: gp.clip_adaptive_(p, 0.5, **a),
        "threshold": lambda p, **a: gp.threshold_gradients_(p, 0.5, **a),
        "top": lambda p, **a: gp.keep_top_gradients_(p, 0.5, **a),
    }
    owners = ("fsdp", 0), ("fsdp", ranks - 1), ("copies", ranks - 1)
    asked = cases_for(itertools.product(calls.items(), owners), ranks)
    for (name, call), (how, owner) in [
        *asked,
        (("top", calls["top"]), owners[1]),
        (("norm", calls["norm"]), owners[2]),
    ]:
        for wrong in (math.nan, -math.inf):
            _, spread = pair(mesh, how, 1)
            if rank == owner:
                local(spread[0].weight.grad).view(-1)[-1] = wrong
            refused(rank, ranks, call, spread, ValueError, "^the gradient of '0.weight' is not finite")
        for nonfinite in ("zero", "skip", "leave"):
            alone, spread = pair(mesh, how, 1)
            if rank == owner:
                local(spread[0].weight.grad).view(-1)[-1] = math.nan
            alone[0].weight.grad.view(-1)[-1] = math.nan
            found, wanted = (in_quiet(call, model, nonfinite=nonfinite) for model in (spread, alone))
            assert found is wanted is None or float(found) == pytest.approx(float(wanted), rel=1e-6, nan_ok=True)
            for some, other in zip(gradients(spread)[1:], gradients(alone)[1:], strict=True):
                assert torch.allclose(some, other, rtol=2e-6, atol=0), (how, name, nonfinite)
            assert nonfinite == "leave" or not gradients(spread)[0].any()
    _, spread = pair(mesh, "fsdp", 1)
    if rank == ranks - 1:
        local(spread[0].weight.grad).fill_(math.inf)
    assert gp.gradient_norms(spread)["0.weight"] == math.inf


def what_is_wrong_on_one_rank_is_raised_on_all(rank, ranks):
    from torch.distributed.tensor import DTensor, Partial

    mesh, last = mesh_of(ranks), rank == ranks - 1
    other = f"on rank 0, .* on {ranks - 1}"
    cases = (
        (lambda p: gp.clip_by_norm_(p, 2.0 if last else 1.0), f"the argument max_norm is 1.0 {other}"),
        (
            lambda p: gp.clip_by_norm_(p, -1.0 if last else 1.0),
            f"on rank {ranks - 1}: max_norm must be a number, positive",
        ),
        (lambda p: gp.clip_by_norm_(p, 1.0, nonfinite="zero" if last else "skip"), "the argument nonfinite is"),
        (lambda p: gp.clip_by_value_(p, 0.0), "^limit must be a number, positive"),
        (lambda p: gp.clip_by_value_(p, 1.0, nonfinite="no"), "^nonfinite must be one of"),
        (lambda p: gp.threshold_gradients_(p, **{"ratio" if last else "threshold": 1.0}), "the argument amount is"),
        (lambda p: gp.threshold_gradients_(p), "^give exactly one of"),
        (lambda p: gp.keep_top_gradients_(p, 0.5, scope="layer" if last else "global"), "the argument amount is"),
        (lambda p: gp.clip_adaptive_(p, 0.5, eps=0.1 if last else 0.2), f"the argument eps is 0.2 {other}"),
        (lambda p: gp.clip_adaptive_(p, -1.0), "^factor must be a number, positive"),
        (lambda p: gp.keep_top_gradients_(p, 1.5 if last else 0.5), f"on rank {ranks - 1}: density must be"),
        (lambda p: gp.AutoClip(20 if last else 10)(p), "the argument percentile is"),
        (lambda p: gp.clip_by_norm_(list(p.parameters())[:1] if last else p, 1.0), "the gradient of '0.weight' is"),
        (lambda p: gp.gradient_norms(p, torch.ones(())), "^a loss is not supported where parameters are DTensors"),
    )
    for call, match in cases:
        refused(rank, ranks, call, pair(mesh, "fsdp", 1)[1], ValueError, match)

    clips = (gp.clip_by_value_, gp.clip_by_norm_, gp.clip_adaptive_, gp.threshold_gradients_, gp.keep_top_gradients_)
    calls = [lambda p, clip=clip: clip(p, 0.5) for clip in clips] + [gp.gradient_norms]
    for call in calls:
        _, model = pair(mesh, "fsdp", 1)
        if last:
            model[0].weight.grad = None
        refused(
            rank, ranks, call, model, ValueError, f"the gradient of '0.weight' is .* on rank 0, None on {ranks - 1}"
        )
        _, model = pair(mesh, "mixed", 1)
        if last:
            model[3].weight.grad += 1.0
        refused(
            rank, ranks, call, model, ValueError, "the gradient of '3.weight' is no DTensor, and its values on rank"
        )
        model[0].weight.grad = DTensor.from_local(torch.ones(7, 5), mesh, [Partial()], run_check=False)
        refused(rank, ranks, call, model, TypeError, "the gradient of '0.weight' is a DTensor P.*, which is not supp")


def flattened_parameters_are_refused(rank, ranks):
    from torch.distributed.fsdp import FullyShardedDataParallel

    for original in (True, False):
        model = FullyShardedDataParallel(chain(1, (5, 7, 6)), device_id=torch.device("cpu"), use_orig_params=original)
        model(torch.ones(2, 5)).sum().backward()
        for call in (
            gp.gradient_norms,
            lambda p: gp.clip_by_norm_(p, 1.0),
            lambda p: gp.clip_by_value_(p.parameters(), 1.0),
            lambda p: gp.clip_adaptive_(p.named_parameters()),
            lambda p: gp.keep_top_gradients_(p, 0.5),
            lambda p: gp.ErrorFeedback(p, 0.5),
            lambda p: gp.Recorder(p, torch.optim.SGD(p.parameters(), 0.1)),
        ):
            refused(rank, ranks, call, model, TypeError, r"FullyShardedDataParallel \(FSDP1\).*fully_shard \(FSDP2\)")


def what_waits_is_that_of_one_process(rank, ranks):
    import torch.distributed.checkpoint as checkpoint

    mesh = mesh_of(ranks)
    rules = ({"density": 0.3}, {"density": 0.2, "scope": "layer", "momentum": 0.5}, {"threshold": 0.7}, {"ratio": 1.2})
    for seed, (how, rule) in cases_for(enumerate(itertools.product(LAYOUTS, rules)), ranks):
        dtype = DTYPES[(seed + seed // 4) % 4]
        models = pair(mesh, how, seed, dtype=dtype)
        one, other = (gp.ErrorFeedback(model, **rule) for model in models)
        for at in range(3):
            for model, again in zip(models, pair(mesh, how, 100 * at + seed, dtype=dtype), strict=True):
                for p, q in zip(model.parameters(), again.parameters(), strict=True):
                    p.grad = q.grad
            assert one.step() == other.step(), (how, rule)
            for found, wanted in zip(gradients(models[1]), gradients(models[0]), strict=True):
                assert torch.equal(bits(found), bits(wanted)), (how, dtype, rule, at)
        for name, waits in one.residuals.items():
            assert torch.equal(whole(other.residuals[name]), waits)
        state = other.state_dict()
        if how == "fsdp":
            folder = [tempfile.mkdtemp()]
            dist.broadcast_object_list(folder)
            checkpoint.save({"feedback": state}, checkpoint_id=folder[0])
            for kind in ("residuals", "velocities"):
                state[kind] = {name: torch.zeros_like(waits) for name, waits in state[kind].items()}
            checkpoint.load({"feedback": state}, checkpoint_id=folder[0])
        third = gp.ErrorFeedback(models[1], **rule)
        third.load_state_dict(state)
        assert third.steps == 3
        assert all(torch.equal(local(third.residuals[n]), local(r)) for n, r in other.residuals.items())
    local(models[1][0].weight.grad).fill_(math.nan if rank == ranks - 1 else 1.0)
    refused(rank, ranks, lambda _: other.step(), models[1], ValueError, "^the gradient of '0.weight' is not finite")
    _, model = pair(mesh, how, 1)
    late = gp.ErrorFeedback(model, 0.5 if rank else 0.4)
    refused(rank, ranks, lambda _: late.step(), model, ValueError, "the argument amount is 0.4 on rank 0, 0.5 on 1")
    state["steps"] = rank
    refused(rank, ranks, lambda _: other.load_state_dict(state), model, ValueError, "the argument steps is 0 on rank 0")


def what_is_not_supported_yet_is_one_error_on_all(rank, ranks):
    for how in ("fsdp", "mixed"):
        model = pair(mesh_of(ranks), how, 1)[1]
        for call in (
            lambda p: gp.Recorder(p, torch.optim.SGD(p.parameters(), 0.1)),
            lambda p: gp.gradient_norms(p, torch.ones(())),
        ):
            refused(
                rank, ranks, call, model, (TypeError, ValueError), "a DTensor .* not supp|not supported where .* DT"
            )


CASES = (
    they_are_those_of_one_process,
    units_are_bounded_as_by_one_process,
    what_waits_is_that_of_one_process,
    norms_are_right_beyond_the_range_of_squares,
    a_step_of_fsdp_is_clipped_as_torch_does,
    a_log_may_be_kept_on_one_rank_alone,
    what_is_not_finite_on_one_rank_is_so_on_all,
    what_is_wrong_on_one_rank_is_raised_on_all,
    flattened_parameters_are_refused,
    what_is_not_supported_yet_is_one_error_on_all,
)

found, test_over_several_processes = group.tested(CASES)
