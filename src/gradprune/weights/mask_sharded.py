"""Which weights stay of parameters that are spread over several processes (chapter 9)?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gradprune.core import copies
from gradprune.core.checks import require, state
from gradprune.core.ranks import ranks_of
from gradprune.core.sharded import layout, like, local, reshard_, together
from gradprune.weights.mask import Masks
from gradprune.weights.named import parameters_of
from gradprune.weights.shown import in_all


class ShardedMasks(Masks):
    """Masks of parameters that are DTensors: DTensors of bool that lie as the parameters do.

    Each rank holds the masks of its own blocks, and knows how many entries of each whole mask stay.
    """

    def __init__(self, masks: Mapping[str, Tensor], kept: Mapping[str, int]) -> None:
        super().__init__({name: local(mask) for name, mask in masks.items()})
        self._masks = dict(masks)
        self._kept = dict(kept)

    def __eq__(self, other: object) -> bool:
        """Whether the blocks of this rank are equal."""
        if not isinstance(other, Mapping):
            return NotImplemented
        return self.keys() == other.keys() and all(
            layout(mask) == layout(other[name]) and torch.equal(local(mask), local(other[name]))
            for name, mask in self.items()
        )

    __hash__ = None

    def __repr__(self) -> str:
        return f"Masks({in_all(self, self._kept)}, sharded)"

    def __copy__(self) -> ShardedMasks:
        twin = ShardedMasks(self._masks, self._kept)
        twin._parameters = dict(self._parameters)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedMasks:
        return ShardedMasks({name: like(mask, local(mask).clone()) for name, mask in self.items()}, self._kept)

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"sharded masks are not pickled: {_SAVE}")

    def state_dict(self) -> dict[str, Any]:
        """The masks by name, as torch.distributed.checkpoint saves them and loads them on any number of ranks."""
        return {name: like(mask, local(mask).clone()) for name, mask in self.items()}  # they are loaded into in place

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> ShardedMasks:
        """Return masks from DTensors of bool by name; all ranks call it together."""
        return cls._read(state_dict, "Masks.from_state_dict")

    @classmethod
    def _read(cls, state_dict: Mapping[str, Any], called: str = "") -> ShardedMasks:
        """What ``from_state_dict`` returns; without a name, of ranks that have met."""

        def each() -> tuple[Mapping[str, Tensor], dict[str, object], Mapping[str, Tensor]]:
            found = state(state_dict, dict.fromkeys(state_dict, Tensor), "Masks")
            Masks({name: local(mask) for name, mask in found.items()})
            return found, {}, found

        ranks = ranks_of(state_dict.values())
        found, shards = together(each, called=called)
        blocks = [shard.local for shard in shards.values()]
        counts = copies.count(shards.values(), blocks, ranks)
        return cls(found, dict(zip(shards, counts, strict=True)))

    def save(self, path: Any) -> None:
        """Refuse: each rank has only its own blocks."""
        raise TypeError(f"sharded masks are not saved to one file: {_SAVE}")

    def to_torch_(self, model: nn.Module) -> None:
        """Refuse: torch.nn.utils.prune knows no DTensors."""
        raise TypeError(
            "torch.nn.utils.prune does not take sharded parameters: hold the masks by masks.hold(optimizer)"
        )

    def _counts(self) -> dict[str, int]:
        return self._kept  # no rank waits for another

    def _told(self) -> dict[str, object]:
        return {"masks (by how many entries stay)": self._kept}

    def _held(self, tensor: Tensor) -> Tensor:
        return local(tensor)

    def _beside(self, tensor: Tensor, name: str) -> Tensor:
        return local(self[name]).to(local(tensor).device)

    def _of(self, model: nn.Module) -> dict[str, nn.Parameter]:
        if isinstance(model, nn.Module):
            reshard_(model)
        parameters = parameters_of(model, self, local)
        for name, parameter in parameters.items():
            mask, own = layout(self[name]), layout(parameter)
            require(mask == own, f"the mask of {name!r} lies as {mask}, the parameter as {own}: shard both alike")
        return parameters

    def _alive(self, model: nn.Module) -> int:
        alive = super()._alive(model)
        return ranks_of(self.values()).add(alive)


_SAVE = "give masks.state_dict() to torch.distributed.checkpoint, and what it loads to Masks.from_state_dict"
