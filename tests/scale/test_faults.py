"""A process that is killed in the middle of a pruning event, or of a save, costs the others nothing but the error."""

import os
import signal
import tempfile
import time
from datetime import timedelta

import group
import pytest
import torch
import torch.distributed as dist
from shards import bits, chain, local, mesh_of, sharded
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradprune as gp

SECONDS = 10  # the timeout of a group


def killed_at(number, function):
    """The function, but that the process is killed by its so many-th call."""
    left = [number]

    def call(*args, **kwargs):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return call


def state_of(model, optimizer):
    tensors = [local(p) for p in model.parameters()]
    tensors += [local(v) for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return [bits(t.reshape(-1)).clone() for t in tensors]


def check_unchanged(model, optimizer, before):
    assert all(torch.equal(old, new) for old, new in zip(before, state_of(model, optimizer), strict=True))


def raised_in_time(call):
    begun = time.monotonic()
    with pytest.raises(RuntimeError) as raised:
        call()
    assert time.monotonic() - begun < 3 * SECONDS
    return str(raised.value)


def anew(ranks, rank, store):
    """A group of those that are left."""
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=SECONDS)
    )


def a_rank_is_killed_in_an_event_and_one_in_a_save(rank, ranks):
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    folder = folder[0]

    # In the middle of the reductions of a sharded model's event.
    model = sharded(chain(1, (8, 16, 4)), "fsdp", mesh_of(ranks))
    optimizer = torch.optim.AdamW(model.parameters())
    masks = gp.prune(model, sparsity=0.3)
    masks.hold(optimizer, model)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    before = state_of(model, optimizer)
    if rank == 3:
        dist.all_reduce = killed_at(4, dist.all_reduce)
    raised_in_time(lambda: gp.prune(model, sparsity=0.6))
    check_unchanged(model, optimizer, before)
    assert all(not local(model.get_parameter(n))[~local(m)].any() for n, m in masks.items())

    # In the middle of a Pruner's event, of three that are left.
    anew(3, rank, f"{folder}/three")
    torch.manual_seed(0)
    ddp = DistributedDataParallel(nn.Linear(8, 8))
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    pruner = gp.Pruner(ddp, optimizer, lambda step: 0.5 if step < 2 else 0.8)
    saved = pruner.state_dict()
    ddp(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    if rank == 2:
        dist.all_gather_object = killed_at(1, dist.all_gather_object)
    raised_in_time(optimizer.step)
    assert pruner.masks == gp.Masks.from_state_dict(saved["masks"])
    assert not ddp.module.weight[~pruner.masks["module.weight"]].any()
    assert len(pruner.events) == 1
    pruner.remove()

    # In the middle of a save, of two that are left: what was saved before is whole, what was half saved is none.
    anew(2, rank, f"{folder}/two")
    model = sharded(chain(1, (8, 16, 4)), "fsdp", mesh_of(2))
    masks = gp.prune(model, sparsity=0.5)
    kept = {name: mask.full_tensor() for name, mask in masks.items()}
    checkpoint.save({"masks": masks.state_dict()}, checkpoint_id=f"{folder}/first")
    if rank == 1:
        checkpoint.FileSystemWriter.write_data = killed_at(1, checkpoint.FileSystemWriter.write_data)
    raised_in_time(lambda: checkpoint.save({"masks": masks.state_dict()}, checkpoint_id=f"{folder}/second"))
    anew(1, 0, f"{folder}/one")
    read = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in chain(1, (8, 16, 4)).named_parameters()}
    with pytest.raises(CheckpointException, match=r"metadata read failed"):
        checkpoint.load({"masks": read}, checkpoint_id=f"{folder}/second")
    assert not any(mask.any() for mask in read.values())
    checkpoint.load({"masks": read}, checkpoint_id=f"{folder}/first")
    assert all(torch.equal(read[name], mask) for name, mask in kept.items())
    dist.destroy_process_group()


def test_over_four_processes_of_which_three_are_killed_one_after_the_other():
    found = group.run([a_rank_is_killed_in_an_event_and_one_in_a_save], 4, timeout=SECONDS, killed=3)
    assert not any(found.values()), found
