"""Models that DistributedDataParallel wraps: one decision for all ranks, or one error."""

import copy
import time
import warnings
from functools import partial
from importlib.util import find_spec

import group
import pytest
import torch
import torch.distributed as dist
from shards import chain, in_quiet, mesh_of, sharded
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradprune as gp


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def batch(rank, step=0):
    made = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(8, 6, generator=made), torch.randint(0, 4, (8,), generator=made)


def of_all(value, group=None):
    told = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, value, group=group)
    return told


def equal_on_all(masks, group=None):
    own = {name: mask.tolist() for name, mask in masks.items()}
    return all(other == own for other in of_all(own, group))


def trained(ddp, optimizer, rank, steps, begin=0):
    for at in range(begin, begin + steps):
        x, y = batch(rank, at)
        optimizer.zero_grad()
        nn.functional.cross_entropy(ddp(x), y).backward()
        optimizer.step()


def scores_differ_and_masks_do_not(rank, ranks):
    scores = {
        "magnitude": gp.magnitude,
        "random": gp.random,
        "one's own generator": partial(gp.random, generator=torch.Generator().manual_seed(rank)),
        "one's own batches": lambda model: gp.gradient(model, [batch(rank)], nn.functional.cross_entropy),
        "one's own half": lambda model: {
            n: p.detach().abs().bfloat16() * (1 + rank) for n, p in model.named_parameters()
        },
        "counts": lambda model: {n: torch.randint(0, 50, p.shape) for n, p in model.named_parameters()},
    }
    asks = ({}, {"scope": "layer"}, {"granularity": "channel", "exclude": "*4.weight"}, {"scope": "lamp"})
    for name, score in scores.items():
        for ask in asks:
            ddp = DistributedDataParallel(net())
            torch.manual_seed(rank)
            masks = in_quiet(gp.prune, ddp, score, sparsity=0.5, **ask)
            assert all(mask.startswith("module.") for mask in masks)
            assert equal_on_all(masks), (name, ask)
            assert masks.holds(ddp)
            assert len(set(of_all(round(masks.sparsity, 6)))) == 1


def chance_is_that_of_rank_0_and_data_that_of_all(rank, ranks):
    ddp = DistributedDataParallel(net())
    own = gp.random(net(), torch.Generator().manual_seed(rank))
    before = copy.deepcopy(own)
    found = gp.prune(ddp, lambda _: {f"module.{n}": s for n, s in own.items()}, sparsity=0.5)
    assert all(torch.equal(own[n], s) for n, s in before.items())
    mean = {n: sum(s) / ranks for n, s in zip(own, zip(*(o.values() for o in of_all(own)), strict=True), strict=True)}
    wanted = gp.prune(net(), lambda _: mean, sparsity=0.5)
    assert all(torch.equal(found[f"module.{n}"], mask) for n, mask in wanted.items())
    score = partial(gp.random, generator=torch.Generator().manual_seed(7 + rank))
    found = gp.prune(DistributedDataParallel(net()), score, sparsity=0.5)
    wanted = gp.prune(net(), partial(gp.random, generator=torch.Generator().manual_seed(7)), sparsity=0.5)
    assert all(torch.equal(found[f"module.{n}"], mask) for n, mask in wanted.items())


def copies_that_differ_in_their_last_bits_get_one_mask(rank, ranks):
    ddp = DistributedDataParallel(net())
    with torch.no_grad():
        for p in ddp.parameters():
            p.copy_(p.bfloat16()).mul_(1 + rank * torch.rand(p.shape) / 50)
    for ask in ({"sparsity": 0.5}, {"threshold": 0.15}):
        assert equal_on_all(in_quiet(gp.prune, ddp, **ask))


def a_pruner_decides_for_all_ranks(rank, ranks):
    for by, score in ((gp.random, gp.magnitude), (gp.gradient, gp.random)):
        ddp = DistributedDataParallel(net())
        torch.manual_seed(rank)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
        regrow = gp.Regrow(by, fraction=0.3, every=2)
        pruner = gp.Pruner(ddp, optimizer, gp.Cubic(final=0.7, begin=1, end=4), score, regrow=regrow)
        trained(ddp, optimizer, rank, 7)
        assert equal_on_all(pruner.masks)
        assert pruner.masks.holds(ddp)
        assert sum(sum(event.regrown.values()) for event in pruner.events) > 0
        weights = {n: p.detach().tolist() for n, p in ddp.named_parameters()}
        assert all(other == weights for other in of_all(weights))
        saved = copy.deepcopy(pruner.state_dict())
        pruner.load_state_dict(saved)
        other = partial(pruner.load_state_dict, saved | {"step": 7 + rank})
        refused(other, ValueError, "all ranks must ask the same")
        pruner.remove()


def coupled_channels_go_alike_at_once_and_step_by_step(rank, ranks):
    x, group = batch(0)[0], {"granularity": "group"}
    wanted = gp.prune(net(), sparsity=0.4, example=x, **group)
    found = gp.prune(DistributedDataParallel(net()), sparsity=0.4, example=x, **group)
    assert {f"module.{name}": mask.tolist() for name, mask in wanted.items()} == {
        n: m.tolist() for n, m in found.items()
    }
    ddp = DistributedDataParallel(net())
    torch.manual_seed(rank)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    pruner = gp.Pruner(ddp, optimizer, gp.Cubic(final=0.4, begin=1, end=4), gp.random, example=batch(rank)[0], **group)
    trained(ddp, optimizer, rank, 6)
    assert equal_on_all(pruner.masks)
    assert pruner.masks.holds(ddp)
    assert pruner.masks.sparsity > 0.3
    assert not bool(pruner.masks["module.0.bias"].all())
    refused(partial(gp.Pruner, ddp, optimizer, gp.OneShot(0.5), example=x), ValueError, "example is for granularity")


def norms_are_those_of_the_mean_gradients(rank, ranks):
    ddp, (x, y) = DistributedDataParallel(net(), find_unused_parameters=True), batch(rank)
    loss = nn.functional.cross_entropy(ddp(x), y)
    found = gp.gradient_norms(ddp, loss)
    assert all(p.grad is None for p in ddp.parameters())
    loss.backward()
    wanted = gp.gradient_norms(ddp)
    assert list(found) == list(wanted)
    assert found == pytest.approx(wanted, rel=1e-6)
    assert len(set(map(str, of_all(found)))) == 1
    on_some = ddp.module[0](x).sum() if rank == 0 else ddp(x).sum()  # on rank 0 without the last layers
    last = gp.gradient_norms(ddp, on_some)["module.4.weight"]
    own = torch.autograd.grad(ddp.module(x).sum(), ddp.module[4].weight)[0]
    mean = sum(g for r, g in enumerate(of_all(own)) if r) / ranks
    assert last == pytest.approx(float(mean.norm()), rel=1e-5)
    refused(lambda: gp.gradient_norms(ddp, None if rank is None else x if rank else on_some), ValueError, "^on rank 1")


def refused(call, kind, match, group=None):
    with pytest.raises(kind, match=match) as raised:
        call()
    told = of_all(str(raised.value), group)
    assert len(set(told)) == 1, told


def what_is_wrong_on_one_rank_is_raised_on_all(rank, ranks):
    last = rank == ranks - 1
    ddp = DistributedDataParallel(net())
    before = copy.deepcopy(ddp.state_dict())
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)

    def broken(model):
        if last:
            raise ValueError("no data here")
        return gp.random(model)

    for score, amount, kind, match in (
        (gp.magnitude, 0.25 if last else 0.5, ValueError, f"argument sparsity is 0.5 on rank 0, 0.25 on {ranks - 1}"),
        (gp.magnitude, 1.5 if last else 0.5, ValueError, f"^on rank {ranks - 1}: sparsity must be in"),
        (gp.random, 1.5 if last else 0.5, ValueError, f"^on rank {ranks - 1}: sparsity must be in"),
        (gp.magnitude, 1.5, ValueError, "^sparsity must be in"),
        (broken, 0.5, ValueError, f"^on rank {ranks - 1}: no data here"),
        (lambda m: {n: p / (0 if last else 1) * 0 for n, p in m.named_parameters()}, 0.5, ValueError, "NaN"),
        (lambda m: None if last else gp.random(m), 0.5, ValueError, "the score of"),
        (lambda _: None, 0.5, TypeError, "must return a dict"),
        (lambda m: dict(sorted(gp.random(m).items(), reverse=last)), 0.5, ValueError, "has another order of"),
        ("magnitude", 0.5, TypeError, "give the function itself"),
    ):
        refused(partial(gp.prune, ddp, score, sparsity=amount), kind, match)
    refused(lambda: gp.prune("a model", sparsity=0.5), TypeError, "^model must be")
    with torch.no_grad():
        ddp.module[0].weight[0, 0] = torch.nan if last else before["module.0.weight"][0, 0]
    refused(partial(gp.prune, ddp, sparsity=0.5), ValueError, f"^on rank {ranks - 1}: .*NaN")
    ddp.load_state_dict(before)
    masks = gp.prune(ddp, sparsity=0.5)
    other = gp.Masks({name: ~mask if last else mask for name, mask in masks.items()})
    refused(lambda: other.apply_(ddp), ValueError, r"the argument masks \(by their hash\) is")
    refused(lambda: other.hold(optimizer, ddp), ValueError, r"the argument masks \(by their hash\) is")
    ours = torch.optim.SGD((net() if last else ddp).parameters(), lr=0.1)
    refused(lambda: masks.hold(ours), ValueError, f"^on rank {ranks - 1}: the optimizer owns none")
    schedule = gp.OneShot(0.25 if last else 0.5)
    warnings.simplefilter("ignore")
    refused(lambda: gp.Pruner(ddp, optimizer, schedule), ValueError, "the argument schedule is")
    refused(lambda: gp.Pruner(ddp, None if last else optimizer, schedule), TypeError, f"^on rank {ranks - 1}: ")
    refused(
        lambda: masks.apply_(ddp) if last else gp.prune(ddp, sparsity=0.5),
        ValueError,
        "the call is gp.prune on rank 0, Masks.apply_ on",
    )
    loss = ddp(batch(rank)[0]).sum()
    refused(
        lambda: gp.gradient_norms(ddp, loss) if last else masks.apply_(ddp),
        ValueError,
        "the call is Masks.apply_ on rank 0, gp.gradient_norms on",
    )
    with masks.hold(optimizer):
        trained(ddp, optimizer, rank, 2)
    assert masks.holds(ddp)
    warnings.resetwarnings()


def replicas_of_some_processes_decide_without_the_others(rank, ranks):
    first, last = ranks - 2, ranks - 1
    pair = dist.new_group([first, last])
    if rank < first:
        return
    ddp = DistributedDataParallel(net(), process_group=pair)
    for score in (
        partial(gp.random, generator=torch.Generator().manual_seed(rank)),
        lambda model: {n: s * (1 + rank) for n, s in gp.random(model).items()},
    ):
        torch.manual_seed(rank)
        assert equal_on_all(gp.prune(ddp, score, sparsity=0.5), pair)
    by_chance = (partial(gp.random, generator=torch.Generator().manual_seed(r)) for r in (rank, first))
    found, wanted = (gp.prune(model, score, sparsity=0.5) for model, score in zip((ddp, net()), by_chance, strict=True))
    assert all(torch.equal(found[f"module.{n}"], mask) for n, mask in wanted.items())

    ddp = DistributedDataParallel(net(), process_group=pair)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    regrow = gp.Regrow(gp.gradient, fraction=0.3, every=2)
    pruner = gp.Pruner(ddp, optimizer, gp.Cubic(final=0.7, begin=0, end=3), gp.random, regrow=regrow)
    trained(ddp, optimizer, rank, 4)
    assert equal_on_all(pruner.masks, pair)
    assert sum(sum(event.regrown.values()) for event in pruner.events) > 0
    pruner.remove()
    optimizer.zero_grad()
    x, y = batch(rank)
    loss = nn.functional.cross_entropy(ddp(x), y)
    found = gp.gradient_norms(ddp, loss)
    loss.backward()
    assert found == pytest.approx(gp.gradient_norms(ddp), rel=1e-6)

    with torch.no_grad():
        for p in ddp.parameters():
            p.copy_(p.bfloat16()).mul_(1 + (rank == last) * torch.rand(p.shape) / 50)
    assert equal_on_all(in_quiet(gp.prune, ddp, sparsity=0.5), pair)
    ask = partial(gp.prune, ddp, sparsity=0.25 if rank == last else 0.5)
    refused(ask, ValueError, f"argument sparsity is 0.5 on rank {first}, 0.25 on {last}", pair)
    ask = partial(gp.prune, ddp, sparsity=1.5 if rank == last else 0.5)
    refused(ask, ValueError, f"^on rank {last}: sparsity must be in", pair)


def calls_leave_nothing_in_the_store(rank, ranks):
    ddp = DistributedDataParallel(net())
    masks = gp.prune(ddp, sparsity=0.5)

    def keys():
        dist.barrier()
        found = _store().num_keys()
        dist.barrier()
        return found

    before = keys()
    for _ in range(4):
        masks.apply_(ddp)
    assert keys() == before


def what_was_a_replica_is_pruned_alone_once_the_group_has_ended(rank, ranks):
    ddp, wanted = DistributedDataParallel(net()), gp.prune(net(), sparsity=0.5)
    dist.destroy_process_group()
    found = gp.prune(ddp, sparsity=0.5)
    assert all(torch.equal(found[f"module.{n}"], mask) for n, mask in wanted.items())


CASES = (
    scores_differ_and_masks_do_not,
    chance_is_that_of_rank_0_and_data_that_of_all,
    copies_that_differ_in_their_last_bits_get_one_mask,
    a_pruner_decides_for_all_ranks,
    *([coupled_channels_go_alike_at_once_and_step_by_step] if find_spec("torch_pruning") else []),
    norms_are_those_of_the_mean_gradients,
    what_is_wrong_on_one_rank_is_raised_on_all,
    replicas_of_some_processes_decide_without_the_others,
    calls_leave_nothing_in_the_store,
    what_was_a_replica_is_pruned_alone_once_the_group_has_ended,
)


def a_rank_that_stays_away_is_named(rank, ranks):
    ddp = DistributedDataParallel(net())
    masks = gp.Masks({name: torch.ones_like(p, dtype=torch.bool) for name, p in ddp.named_parameters()})
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    shards = sharded(chain(1, (5, 7, 6)), "fsdp", mesh_of(ranks))
    loss = ddp(batch(rank)[0]).sum()
    calls = (
        ("gp.prune", lambda: gp.prune(ddp, sparsity=0.5)),
        ("gp.prune", lambda: gp.prune(shards, sparsity=0.5)),
        ("Masks.apply_", lambda: masks.apply_(ddp)),
        ("Masks.hold", lambda: masks.hold(optimizer, ddp)),
        ("gp.Pruner", lambda: gp.Pruner(ddp, optimizer, gp.OneShot(0.5))),
        ("gp.gradient_norms", lambda: gp.gradient_norms(ddp, loss)),
    )
    before, last = copy.deepcopy(ddp.state_dict()), ranks - 1
    for at, (called, call) in enumerate(calls):
        if rank == last:
            await_(at, range(last))  # the others have given up
        with pytest.raises(RuntimeError, match=f"^{called}: rank {last} of {ranks} did not call it within 0:00:0"):
            call()
        _store().set(f"test/{at}/{rank}", "raised")
        await_(at, range(ranks))
    assert all(torch.equal(p, before[name]) for name, p in ddp.state_dict().items())


def one_of_a_pair_that_stays_away_is_named(rank, ranks):
    pair = dist.new_group([1, 2])
    if rank:
        ddp = DistributedDataParallel(net(), process_group=pair)
        if rank == 2:
            await_("pair", [1])
        with pytest.raises(RuntimeError, match=r"^gp.prune: rank 2 of 2 did not call it within"):
            gp.prune(ddp, sparsity=0.5)
        _store().set(f"test/pair/{rank}", "raised")
    await_("pair", [1, 2])


def await_(call, others):
    while not _store().check([f"test/{call}/{r}" for r in others]):
        time.sleep(0.02)


def _store():
    return dist.distributed_c10d._get_default_store()


found, test_over_several_processes = group.tested(CASES)


def test_who_stays_away_is_named_on_all_others_and_on_itself_when_it_comes():
    found = group.run([a_rank_that_stays_away_is_named, one_of_a_pair_that_stays_away_is_named], 3, timeout=2)
    assert not any(found.values()), found
