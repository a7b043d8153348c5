"""What processes add up and tell each other, among all of them or those of a group."""

import group
import torch
import torch.distributed as dist

from gradprune.core.ranks import Ranks

CPU = torch.device("cpu")


def among(rank, ranks):
    """All processes, and the last two as a group, with the ranks that are in it; None for who is not."""
    last = [ranks - 2, ranks - 1]
    pair = dist.new_group(last)
    every = Ranks(CPU), list(range(ranks))
    return every, (Ranks(CPU, pair), last) if rank in last else None


def numbers_of_all_are_added_up_and_compared(rank, ranks):
    for found in filter(None, among(rank, ranks)):
        together, members = found
        own = torch.tensor([float(rank), -float(rank), 1.0])
        assert together.sum(own).tolist() == [sum(members), -sum(members), len(members)]
        assert together.most(own).tolist() == [max(members), -min(members), 1.0]
        assert own.tolist() == [rank, -rank, 1.0]  # as it was
        assert together.add(2**40 + rank) == len(members) * 2**40 + sum(members)
        flags = [rank == members[0], rank == members[-1], False, True]
        assert together.on_any(flag for flag in flags) == [True, True, False, True]
        assert together.on_any([]) == []


def what_one_has_all_get(rank, ranks):
    for found in filter(None, among(rank, ranks)):
        together, members = found
        assert together.source == members[0]
        for source in members:
            own = torch.full((3,), rank)
            assert together.of(own, source).tolist() == [source] * 3
            assert own.tolist() == [rank] * 3
        assert int(together.first(torch.tensor(rank))) == members[0]
        for shape in ((), (0,), (3,), (5, 7), (2, 2, 2)):
            masks = {r: torch.rand(shape, generator=torch.Generator().manual_seed(r)) < 0.5 for r in members}
            for source, mask in masks.items():
                found_mask = together.mask_of(masks[rank], source)
                assert found_mask.dtype == torch.bool
                assert torch.equal(found_mask, mask), shape


CASES = (
    numbers_of_all_are_added_up_and_compared,
    what_one_has_all_get,
)

found, test_over_several_processes = group.tested(CASES)
