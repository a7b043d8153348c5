"""Which architectures does chapter 7 prune? One short entry each, all by the one protocol of `base`."""

from gradprune.lab.zoo import (
    adapters,
    base,
    combined,
    dense,
    diffusion,
    generative,
    heads,
    phase,
    quantum,
    searched,
    sequences,
    table,
    tasks,
    today,
)
from gradprune.lab.zoo.base import Architecture

__all__ = ["ARCHITECTURES", "TODAY", "Architecture", "base", "by_name", "sequences", "table", "tasks"]

ARCHITECTURES: tuple[Architecture, ...] = (
    *dense.ROWS,
    *sequences.ROWS,
    *searched.ROWS,
    *heads.ROWS,
    *generative.ROWS,
    *quantum.ROWS,
    *phase.ROWS,
    *combined.ROWS,
)

# Of the second protocol, with controls of task and kind.
TODAY: tuple[Architecture, ...] = (*today.ROWS, *diffusion.ROWS, *adapters.ROWS)


def by_name(name: str) -> Architecture:
    """Return the architecture of that name. Raises ValueError, with the known names, where there is none."""
    found = {architecture.name: architecture for architecture in (*ARCHITECTURES, *TODAY)}
    if name not in found:
        raise ValueError(f"unknown architecture {name!r}; known are {', '.join(map(repr, found))}")
    return found[name]
