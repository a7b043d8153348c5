"""Meshes of two dimensions, copies by shards or tensor parallel by shards: the results of one process."""

import itertools

import group
import pytest
import scored
import torch
import torch.distributed as dist
from shards import HYBRID, bits, blocks_of, chain, hybrid_mesh, in_quiet, local, made, sharded
from test_sharded_gradients import EXACT, NORMS, UNITS, same_on_all
from torch import nn

import gradprune as gp

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = (5, 7, 8, 3, 16, 4, 2)  # six layers, of one to four blocks each, some uneven or empty


def check_equal(found, wholes, how, mesh, said):
    for one, other in zip(found, blocks_of(wholes, how, mesh), strict=True):
        assert torch.equal(local(one).double(), other), said


def masks_are_those_of_one_process(rank, ranks):
    mesh = hybrid_mesh(ranks)
    asks = (
        {"sparsity": 0.6},
        {"sparsity": 0.37, "scope": "layer"},
        {"sparsity": 0.6, "scope": "lamp"},
        {"sparsity": 0.9, "min_keep": 3},
        {"sparsity": 1.0},
    )
    for seed, (how, values) in enumerate(itertools.product(HYBRID, ("normal", "ties", "equal", "extremes"))):
        for ask in asks:
            case = seed, SIZES, DTYPES[seed % 4], values
            alone, spread = chain(*case), sharded(chain(*case), how, mesh)
            wanted, found = in_quiet(gp.prune, alone, **ask), in_quiet(gp.prune, spread, **ask)
            said = (how, values, ask)
            assert found.sparsity == wanted.sparsity, said
            check_equal(found.values(), wanted.values(), how, mesh, said)
            check_equal(spread.parameters(), alone.parameters(), how, mesh, said)
            assert found.holds(spread)
            if values == "normal":
                assert gp.Masks.from_state_dict(found.state_dict()) == found


def larger_masks_are_those_of_one_process(rank, ranks):
    mesh = hybrid_mesh(ranks)
    for how, values in itertools.product(HYBRID, ("normal", "ties")):
        case = 3, (301, 200, 157), torch.float32, values
        alone, spread = chain(*case), sharded(chain(*case), how, mesh)
        wanted, found = in_quiet(gp.prune, alone, sparsity=0.77), in_quiet(gp.prune, spread, sparsity=0.77)
        check_equal(found.values(), wanted.values(), how, mesh, (how, values))


def gradients_are_those_of_one_process(rank, ranks):
    mesh = hybrid_mesh(ranks)
    for seed, how in enumerate((*HYBRID, *HYBRID)):
        dtype = DTYPES[seed]
        for name, call in (EXACT | NORMS | UNITS).items():
            alone, spread = (chain(seed, SIZES, dtype) for _ in range(2))
            for p in alone.parameters():
                p.grad = made(("normal", "ties")[seed % 2], p.shape).to(dtype)
            spread = sharded(spread, how, mesh)
            for p, block in zip(
                spread.parameters(), blocks_of([p.grad for p in alone.parameters()], how, mesh), strict=True
            ):
                p.grad = like(p, block.to(dtype))
            found, wanted = in_quiet(call, spread), in_quiet(call, alone)
            if wanted is not None:
                same_on_all(float(found))
                assert float(found) == pytest.approx(float(wanted), rel=1e-6)
            grads = blocks_of([p.grad for p in alone.parameters()], how, mesh)
            for p, other in zip(spread.parameters(), grads, strict=True):
                near = 0.0 if name in EXACT else 2e-6 + 2 * torch.finfo(dtype).eps
                assert torch.allclose(local(p.grad).double(), other, rtol=near, atol=0.0), (how, dtype, name)


def like(parameter, block):
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return block
    mesh, places = parameter.device_mesh, parameter.placements
    return DTensor.from_local(block, mesh, places, run_check=False, shape=parameter.shape, stride=parameter.stride())


def each_event_of_a_pruner_is_that_of_one_process(rank, ranks):
    mesh = hybrid_mesh(ranks)
    for how in HYBRID:
        alone, spread = chain(5, SIZES), sharded(chain(5, SIZES), how, mesh)
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.5) for model in (alone, spread)]
        wanted, found = (
            gp.Pruner(
                model, optimizer, gp.Linear(final=0.6, begin=0, end=2), regrow=gp.Regrow(gp.gradient, 0.3, every=2)
            )
            for model, optimizer in zip((alone, spread), optimizers, strict=True)
        )
        for step in range(3):
            torch.manual_seed(step)
            for p in alone.parameters():
                p.grad = torch.randn(p.shape)
            blocks = blocks_of([p.grad for p in alone.parameters()], how, mesh)
            for p, block in zip(spread.parameters(), blocks, strict=True):
                p.grad = like(p, block.float())
            for optimizer in optimizers:
                in_quiet(optimizer.step)
            check_equal(found.masks.values(), wanted.masks.values(), how, mesh, (how, step))
            check_equal(spread.parameters(), alone.parameters(), how, mesh, (how, step))
        assert found.events == wanted.events
        assert sum(sum(event.regrown.values()) for event in found.events) > 0
        found.remove()


def copies_that_differ_in_their_last_bits_get_one_mask(rank, ranks):
    model = sharded(chain(3, (16, 16, 16), torch.bfloat16, "ties"), "hsdp", hybrid_mesh(ranks))
    with torch.no_grad():
        torch.manual_seed(rank)
        for p in model.parameters():
            local(p).mul_(1 + torch.rand(local(p).shape) * (rank > 1) / 64)
    masks = in_quiet(gp.prune, model, sparsity=0.5)
    every = [None] * ranks
    dist.all_gather_object(every, [local(mask).tolist() for mask in masks.values()])
    assert every[0] == every[2]
    assert every[1] == every[3]
    kept = sum(int(local(mask).sum()) for mask in masks.values())
    counts = [None] * ranks
    dist.all_gather_object(counts, kept)
    assert counts[0] + counts[1] == 256


def scores_that_run_the_model_are_those_of_one_process(rank, ranks):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = hybrid_mesh(ranks)
    for how, on, names in (
        ("hsdp", mesh, ("fisher", "grasp", "synflow")),
        ("tp", mesh["first"], ("fisher", "movement", "activation")),
    ):
        for name in names:
            model = scored.network(12, torch.float64)
            if how == "tp":
                parallelize_module(model, mesh["second"], {"3": ColwiseParallel(), "5": RowwiseParallel()})
            for layer in (model[3], model[5], model):
                fully_shard(layer, mesh=on)
            at, shares = (rank, 4) if how == "hsdp" else (rank // 2, 2)
            scored.check_as_one_process(name, model, scored.network(12, torch.float64), at, shares)


def what_is_wrong_on_one_rank_is_raised_on_all(rank, ranks):
    mesh = hybrid_mesh(ranks)
    for how, at in itertools.product(HYBRID, (0, 3)):
        model = sharded(chain(1, SIZES), how, mesh)
        with torch.no_grad():
            if rank == at:
                local(model[4].weight).view(-1)[:1] = torch.nan
        before = [bits(local(p)).clone() for p in model.parameters()]
        with pytest.raises(ValueError, match=r"'4\.weight' contains NaN"):
            gp.prune(model, sparsity=0.5)
        assert all(torch.equal(bits(local(p)), old) for p, old in zip(model.parameters(), before, strict=True))
    model = sharded(chain(1, SIZES), "tp", mesh)
    with torch.no_grad():
        if rank == 3:
            local(model[2].weight).add_(1.0)  # the copy of another mesh, which nothing keeps equal
    with pytest.raises(
        ValueError, match=r"'2\.weight' is spread over several meshes, and its values on rank 3 are not"
    ):
        gp.prune(model, sparsity=0.5)


def they_stay_zero_while_it_trains(rank, ranks):
    model = sharded(chain(2, (8, 16, 16, 4)), "hsdp", hybrid_mesh(ranks))
    masks = gp.prune(model, sparsity=0.7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with masks.hold(optimizer, model):
        for step in range(3):
            torch.manual_seed(10 * step + rank)
            optimizer.zero_grad()
            model(torch.randn(4, 8)).square().sum().backward()
            gp.clip_by_norm_(model, 1.0)
            optimizer.step()
            assert masks.holds(model)
    assert nn.utils.parameters_to_vector([local(p) for p in model.parameters()]).any()


CASES = (
    masks_are_those_of_one_process,
    larger_masks_are_those_of_one_process,
    gradients_are_those_of_one_process,
    each_event_of_a_pruner_is_that_of_one_process,
    copies_that_differ_in_their_last_bits_get_one_mask,
    scores_that_run_the_model_are_those_of_one_process,
    what_is_wrong_on_one_rank_is_raised_on_all,
    they_stay_zero_while_it_trains,
)


@pytest.fixture(scope="module")
def found():
    return group.run(CASES, 4)


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_over_four_processes(found, case):
    assert not found[case], found[case]
