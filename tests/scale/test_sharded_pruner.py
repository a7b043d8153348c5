"""gp.Pruner on DTensors: at each event the masks of one process, over several, also in a run that goes on elsewhere."""

import copy
import tempfile
from functools import partial

import group
import pytest
import torch
import torch.distributed as dist
from shards import bits, cases_for, chain, in_quiet, local, mesh_of, part, sharded

import gradprune as gp

EVEN, UNEVEN = (8, 12, 24, 6), (5, 7, 1, 8, 3)  # widths: over two and three ranks no shard is cut short, or some are


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.5, weight_decay=0.125)


def stepped(models, optimizers, step):
    """One step of a model in one process and of one that is spread, with the same gradients."""
    torch.manual_seed(step)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        one.grad = torch.randn(one.shape)
        other.grad = like(other, part(one.grad, other))
    for optimizer in optimizers:
        in_quiet(optimizer.step)


def like(parameter, block):
    if not hasattr(parameter, "to_local"):
        return block.clone()
    mesh, places = parameter.device_mesh, parameter.placements
    made = type(parameter.data).from_local
    return made(block.clone(), mesh, places, run_check=False, shape=parameter.shape, stride=parameter.stride())


def check_same(alone, spread, pruners, said):
    (wanted, found), models = pruners, (alone, spread)
    assert found.masks.sparsity == wanted.masks.sparsity, said
    for name, mask in found.masks.items():
        assert torch.equal(local(mask), part(wanted.masks[name], mask)), (said, name)
        one, other = (model.get_parameter(name) for model in models)
        assert torch.equal(bits(local(other)), bits(part(one, other).clone())), (said, name)
    assert found.events == wanted.events, said


def compared(mesh, how, sizes, steps, schedule, **asked):
    """Prune a model and one that is spread as they are trained; return what holds them."""
    models = alone, spread = chain(3, sizes), sharded(chain(3, sizes), how, mesh)
    optimizers = [optimizer_of(model) for model in models]
    pruners = [
        in_quiet(gp.Pruner, model, optimizer, schedule, **asked)
        for model, optimizer in zip(models, optimizers, strict=True)
    ]
    for step in range(steps):
        stepped(models, optimizers, step)
        check_same(alone, spread, pruners, (how, sizes, asked, step))
    assert len(pruners[1].events) >= 2
    return models, optimizers, pruners


def each_event_is_that_of_one_process(rank, ranks):
    mesh, schedule = mesh_of(ranks), gp.Cubic(final=0.8, begin=0, end=3)
    runs = (
        ("fsdp", EVEN, schedule, {}),
        ("columns", UNEVEN, schedule, {}),
        ("fsdp", UNEVEN, lambda step: 0.1 * step, {"amount": "threshold"}),
        ("fsdp", UNEVEN, schedule, {"scope": "layer"}),
        ("columns", UNEVEN, schedule, {"scope": "lamp"}),
        ("mixed", UNEVEN, gp.Linear(final=0.5, begin=0, end=2), {"scope": "erk", "exclude": "1.*"}),
    )
    for how, sizes, wanted, asked in cases_for(runs, ranks):
        _, _, (one, other) = compared(mesh, how, sizes, 3, wanted, **asked)
        assert repr(other) == repr(one)


def what_is_pruned_already_stays_so(rank, ranks):
    models = alone, spread = chain(3, UNEVEN), sharded(chain(3, UNEVEN), "fsdp", mesh_of(ranks))
    optimizers = [optimizer_of(model) for model in models]
    before = [in_quiet(gp.prune, model, sparsity=0.4) for model in models]
    for given in ((None, None), before):
        pruners = [
            in_quiet(gp.Pruner, model, optimizer, gp.OneShot(0.7, at=1), within=within)
            for model, optimizer, within in zip(models, optimizers, given, strict=True)
        ]
        check_same(alone, spread, pruners, given)
        assert pruners[1].masks == before[1]
        if given is not before:
            for pruner in pruners:
                pruner.remove()
    stepped(models, optimizers, 0)
    check_same(alone, spread, pruners, "within")
    assert pruners[1].masks.sparsity > 0.69
    assert all(not local(mask)[~local(before[1][name])].any() for name, mask in pruners[1].masks.items())


def weights_come_back_as_in_one_process(rank, ranks):
    mesh, schedule = mesh_of(ranks), gp.Linear(final=0.6, begin=0, end=2)
    for how, sizes in cases_for((("fsdp", UNEVEN), ("columns", EVEN)), ranks):
        regrow = gp.Regrow(gp.gradient, fraction=0.3, every=2)
        _, _, (_, found) = compared(mesh, how, sizes, 4, schedule, regrow=regrow)
        assert sum(sum(event.regrown.values()) for event in found.events) > 0
    models, optimizers = [], []
    for model in (chain(3, UNEVEN), sharded(chain(3, UNEVEN), "fsdp", mesh)):  # by chance: from one seed
        models.append(model)
        optimizers.append(optimizer_of(model))
    pruners = []
    for model, optimizer in zip(models, optimizers, strict=True):
        by = partial(gp.random, generator=torch.Generator().manual_seed(5 if model is models[0] else 5 + rank))
        pruners.append(gp.Pruner(model, optimizer, gp.OneShot(0.5), regrow=gp.Regrow(by, 0.3, every=1)))
    for step in range(2):
        stepped(models, optimizers, step)
        check_same(*models, pruners, "by chance")


def trained(model, optimizer, steps, begin=0):
    for step in range(begin, begin + steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(4, model[0].in_features)).square().mean().backward()
        optimizer.step()


def zeros_stay_while_a_sharded_model_trains(rank, ranks):
    model = sharded(chain(2, (8, 16, 16, 5)), "fsdp", mesh_of(ranks))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    pruner = gp.Pruner(model, optimizer, gp.Cubic(final=0.7, begin=1, end=4))
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 2))  # the first rate is zero
    for step in range(5):
        trained(model, optimizer, 1, step)
        warmup.step()
        assert pruner.masks.holds(model)
    assert pruner.step == 5
    assert pruner.masks.sparsity == pytest.approx(0.7, abs=0.002)


def what_is_wrong_on_one_rank_is_raised_on_all(rank, ranks):
    last = rank == ranks - 1
    model = sharded(chain(1, UNEVEN), "fsdp", mesh_of(ranks))
    optimizer, before = optimizer_of(model), [bits(local(p)).clone() for p in model.parameters()]
    make = partial(gp.Pruner, model, optimizer)
    refused(partial(make, gp.OneShot(0.25 if last else 0.5)), ValueError, "the argument schedule is")
    refused(partial(gp.Pruner, model, None if last else optimizer, gp.OneShot(0.5)), TypeError, "^on rank")
    refused(partial(make, gp.OneShot(0.5), within={"no": 1} if last else {}), ValueError, "^on rank .*names 'no'")
    pruner = make(gp.OneShot(0.5, at=9))
    saved = pruner.state_dict()
    refused(lambda: pruner.load_state_dict(saved | {"step": 3 + rank}), ValueError, "all ranks must ask the same")
    refused(lambda: pruner.load_state_dict(saved | {"events": "{" if last else "[]"}), ValueError, "^on rank .*JSON")
    assert all(torch.equal(bits(local(p)), old) for p, old in zip(model.parameters(), before, strict=True))
    pruner.remove()


def refused(call, kind, match):
    with pytest.raises(kind, match=match) as raised:
        in_quiet(call)
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, str(raised.value))
    assert len(set(told)) == 1, told


CASES = (
    each_event_is_that_of_one_process,
    what_is_pruned_already_stays_so,
    weights_come_back_as_in_one_process,
    zeros_stay_while_a_sharded_model_trains,
    what_is_wrong_on_one_rank_is_raised_on_all,
)


def begun(ranks):
    """A run in one process and one over several, of which two of six steps are over."""
    return compared(mesh_of(ranks), "fsdp", UNEVEN, 2, gp.Cubic(final=0.9, begin=0, end=6))


def saved_by_two(folder, rank, ranks):
    import torch.distributed.checkpoint as checkpoint

    (_, model), _, (_, pruner) = begun(ranks)
    state = {"model": model.state_dict(), "pruner": pruner.state_dict()}
    checkpoint.save(state, checkpoint_id=folder)
    pruner.remove()


def goes_on_over_others(folder, rank, ranks):
    import torch.distributed.checkpoint as checkpoint

    (alone, _), (optimizer, _), (wanted, _) = begun(ranks)
    model = sharded(chain(9, UNEVEN), "fsdp", mesh_of(ranks))
    other = optimizer_of(model)
    pruner = gp.Pruner(model, other, gp.Cubic(final=0.9, begin=0, end=6))
    state = {"model": model.state_dict(), "pruner": pruner.state_dict()}
    checkpoint.load(state, checkpoint_id=folder)
    assert not any((~local(mask)).any() for mask in pruner.masks.values())  # until it is told
    pruner.load_state_dict(state["pruner"])
    for p, q in zip(alone.parameters(), model.parameters(), strict=True):  # the momentum is a new one on both sides
        optimizer.state.pop(p, None)
        assert torch.equal(bits(local(q)), bits(part(p, q).clone()))
    for step in (2, 3):
        stepped((alone, model), (optimizer, other), step)
        check_same(alone, model, (wanted, pruner), step)


def goes_on_in_one_process(folder, rank, ranks):
    import torch.distributed.checkpoint as checkpoint

    _, _, (wanted, _) = begun(ranks)
    model = chain(9, UNEVEN)
    pruner = gp.Pruner(model, optimizer_of(model), gp.Cubic(final=0.9, begin=0, end=6))
    empty = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    state = {"model": model.state_dict(), "pruner": pruner.state_dict() | {"masks": empty}}
    checkpoint.load(state, checkpoint_id=folder)
    pruner.load_state_dict(state["pruner"])
    assert pruner.masks == wanted.masks
    assert (pruner.step, pruner.events) == (wanted.step, wanted.events)
    # And back: each rank takes its blocks of what one process saved.
    spread = sharded(chain(9, UNEVEN), "fsdp", mesh_of(ranks))
    other = gp.Pruner(spread, optimizer_of(spread), gp.Cubic(final=0.9, begin=0, end=6))
    other.load_state_dict(copy.deepcopy(wanted.state_dict()))
    assert all(torch.equal(local(mask), part(wanted.masks[name], mask)) for name, mask in other.masks.items())
    assert other.events == wanted.events


found, test_over_several_processes = group.tested(CASES)


class _In:
    """A case with a folder, which the processes can be sent."""

    def __init__(self, case, folder):
        self.case, self.folder, self.__name__ = case, folder, case.__name__

    def __call__(self, rank, ranks):
        self.case(self.folder, rank, ranks)


def test_what_two_processes_saved_goes_on_over_three_and_in_one():
    with tempfile.TemporaryDirectory() as folder:
        for case, ranks in ((saved_by_two, 2), (goes_on_over_others, 3), (goes_on_in_one_process, 1)):
            found = group.run([_In(case, folder)], ranks)
            assert not any(found.values()), found
