"""How do processes add up numbers, and tell each other what one of them has?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradprune.core.agree import Group
from gradprune.core.checks import is_distributed


class Ranks(NamedTuple):
    """Processes, all of them or those of a group, and the device through which they talk."""

    device: torch.device
    group: Group = None

    def sum(self, numbers: Tensor) -> Tensor:
        """Return the sum over all ranks, on the CPU."""
        total = numbers.to(self.device, copy=True)
        torch.distributed.all_reduce(total, group=self.group)
        return total.cpu()

    def most(self, numbers: Tensor) -> Tensor:
        """Return the largest over all ranks, on the CPU; none of the numbers is NaN."""
        largest = numbers.to(self.device, copy=True)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=self.group)
        return largest.cpu()

    def add(self, number: int) -> int:
        """Return the sum of one number over all ranks."""
        return int(self.sum(torch.tensor([number], device="cpu")))

    def on_any(self, flags: Iterable[bool]) -> list[bool]:
        """Return which flags are set on any rank."""
        own = torch.tensor([int(flag) for flag in flags], device="cpu")
        return [bool(found) for found in self.most(own).tolist()]

    def first(self, values: Tensor) -> Tensor:
        """Return what the first rank has, on the CPU."""
        return self.of(values, self.source)

    @property
    def source(self) -> int:
        """The first rank, as all processes number them."""
        return 0 if self.group is None else torch.distributed.get_global_rank(self.group, 0)

    def of(self, values: Tensor, rank: int) -> Tensor:
        """Return what one rank has, on the CPU; the others give tensors like it."""
        sent = values.to(self.device, copy=True)
        torch.distributed.broadcast(sent, src=rank, group=self.group)
        return sent.cpu()

    def mask_of(self, mask: Tensor, rank: int) -> Tensor:
        """Return what ``of`` does, sent as one bit an entry."""
        flat = mask.reshape(-1).cpu().numpy()
        bits = self.of(torch.from_numpy(np.packbits(flat)), rank)
        return torch.from_numpy(np.unpackbits(bits.numpy(), count=flat.size).view(np.bool_)).view(mask.shape)


def ranks_of(tensors: Iterable[Tensor]) -> Ranks:
    """Return all processes, with the device on which the tensors are spread."""
    kind = next(t.device_mesh.device_type for t in tensors if is_distributed(t))  # type: ignore[attr-defined]
    return Ranks(torch.device(kind, getattr(torch, kind).current_device()) if kind != "cpu" else torch.device("cpu"))
