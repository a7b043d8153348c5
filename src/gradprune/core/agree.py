"""How do several processes find out that all are here, that nothing is wrong on any, and that all ask the same?

A rank that raised by itself would let the others wait for ever. So each tells the others what is wrong before any of
them raises, and all raise the same. A rank that is not there at all is found by the store that torch.distributed was
started with: whoever waits longer than the process group's timeout says on all ranks that came which did not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Group = Any  # torch.distributed.ProcessGroup, which not every build of torch has; None is the default one

_MET: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_ALL = b"all"


def meet(called: str, group: Group = None) -> None:
    """Wait until every rank of a group calls this too; raise RuntimeError that names who did not within the timeout.

    A rank that comes after the others gave up raises the same. The timeout is that given to ``init_process_group``.
    """
    group = group or torch.distributed.group.WORLD
    ranks = _ranks(group)
    c10d: Any = torch.distributed.distributed_c10d
    store = c10d.PrefixStore(f"gradprune/{group.group_name}", c10d._get_default_store())
    meeting = _MET[group] = _MET.get(group, 0) + 1
    store.set(f"at/{torch.distributed.get_rank()}", str(meeting))
    fate = f"fate/{meeting}"
    if store.add(f"here/{meeting}", 1) == len(ranks):
        store.compare_set(fate, "", _ALL.decode())
        for old in (f"here/{meeting - 1}", f"fate/{meeting - 1}"):  # which every rank has left
            store.delete_key(old)
    else:
        try:
            store.wait([fate])
        except RuntimeError:
            missing = [r for r in ranks if not _is_at(store, r, meeting)]
            store.compare_set(fate, "", _missing(called, missing, ranks, store.timeout))
    if (said := store.get(fate)) != _ALL:
        raise RuntimeError(said.decode())


def _ranks(group: Group) -> list[int]:
    """The ranks of a group, as all processes number them."""
    return torch.distributed.get_process_group_ranks(group or torch.distributed.group.WORLD)


def _is_at(store: Any, rank: int, meeting: int) -> bool:
    return bool(store.check([f"at/{rank}"])) and int(store.get(f"at/{rank}")) >= meeting


def _missing(called: str, missing: Sequence[int], ranks: Sequence[int], timeout: Any) -> str:
    who = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))}"
    return (
        f"{called}: {who} of {len(ranks)} did not call it within {timeout}, the process group's timeout; all ranks "
        "must call it together. Nothing was changed"
    )


def agree(
    called: str,
    work: Callable[[], tuple[T, Mapping[str, object], Any]],
    group: Group = None,
    *,
    what: str = "the argument {}",
) -> tuple[T, list[Any]]:
    """Do what each rank does by itself; return its result, and what each rank tells the others, by rank.

    `work` returns a result, what was asked for (compared as text) and what to tell. Where it raises on one rank, or
    ranks ask for different things, all ranks raise the same. `work` may itself agree on something: a rank whose work
    raised before that is heard there.
    """
    result, asked, told, error = None, {}, None, None
    try:
        result, given, told = work()
        asked = {name: repr(value) for name, value in given.items()}
    except Exception as raised:
        if getattr(raised, "_gradprune_told", False):
            raise
        error = raised
    ranks = _ranks(group)
    every: list[Any] = [None] * len(ranks)
    torch.distributed.all_gather_object(every, (called, _as_told(error), asked, told), group=group)
    _raise_first([failure for _, failure, _, _ in every], ranks, error)
    require_same([{"call": one[0]} for one in every], "the {}", ranks)
    require_same([one[2] for one in every], what, ranks)
    return result, [one[3] for one in every]  # type: ignore[return-value]


def require_same(told: Sequence[Mapping[str, object]], what: str, ranks: Sequence[int]) -> None:
    """Raise ValueError where one of the ranks tells something else than the first does; `what` calls a name."""
    for rank, other in zip(ranks, told, strict=True):
        for name in [*told[0], *other]:
            if (first := told[0].get(name)) != (second := other.get(name)):
                called = what.format(name)
                differ = f"{called} is {first} on rank {ranks[0]}, {second} on {rank}"
                raise _told(ValueError(f"all ranks must ask the same, but {differ}"))
        if list(told[0]) != list(other):
            raise _told(
                ValueError(f"all ranks must ask the same, but rank {rank} has another order of {list(told[0])}")
            )


def equal_on_all(values: Sequence[Any]) -> bool:
    """Whether what was told is the same for all ranks."""
    return all(value == values[0] for value in values)


def _told(error: Exception) -> Exception:
    """An error that all ranks raise: who hears it need not tell."""
    error._gradprune_told = True  # type: ignore[attr-defined]
    return error


def _as_told(error: Exception | None) -> tuple[str, str] | None:
    return None if error is None else (type(error).__name__, str(error))


def _raise_first(failures: Sequence[tuple[str, str] | None], ranks: Sequence[int], own: Exception | None) -> None:
    """Raise what the first rank that failed says, which is named where not all say the same."""
    failed = [(rank, failure) for rank, failure in zip(ranks, failures, strict=True) if failure is not None]
    if not failed:
        return
    rank, (kind, message) = failed[0]
    where = "" if failures.count((kind, message)) == len(failures) else f"on rank {rank}: "
    raise _told({"TypeError": TypeError, "ValueError": ValueError}.get(kind, RuntimeError)(where + message)) from own
