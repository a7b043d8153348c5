"""Which of our arguments is meant by a keyword that is none of them, as other libraries call theirs?"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

_FOREIGN = {  # what is ours -> what others call it; of those that a function has, the first that fits
    "model=": "module network net",
    "params=": "parameters model",
    "sparsity=": "amount ratio pruning_ratio sparsity_ratio target_sparsity fraction percentage percent rate",
    "sparsity=1 - density": "density",
    'granularity="2:4"': "n m prune_n prune_m",
    'granularity="channel"': "dim structured",
    "score=": "criterion importance importance_scores pruning_method method",
    "include=": "layers modules targets parameters",
    "exclude=": "ignored_layers ignore skip",
    "within=": "mask masks",
    "damp=": "percdamp dampening_frac",
    "final=": "sparsity final_sparsity target_sparsity amount",
    "initial=": "initial_sparsity",
    "begin=": "begin_step start",
    "end=": "end_step stop",
    "every=": "frequency interval",
    "rate=": "amount sparsity ratio pruning_ratio",
    "rounds=": "iterations iterative_steps num_rounds",
    "limit=": "clip_value max_norm max_value value threshold",
    "max_norm=": "clip_value limit max_value value threshold",
    "norm_type=": "p ord",
    "nonfinite=": "error_if_nonfinite",
    "density=": "compress_ratio compression_ratio amount k topk sparsity",
}


def instead(word: str, known: Collection[str]) -> str:
    """Say which of the known arguments is meant by a word, or which there are."""
    for ours, theirs in _FOREIGN.items():
        if word in theirs.split() and ours.partition("=")[0] in known:
            return f"{ours} is what it is called here" if ours.endswith("=") else f"write {ours}"
    close = difflib.get_close_matches(word, known, 1)
    return f"did you mean {close[0]}=?" if close else f"it takes {', '.join(known)}"


def in_our_words(function: F) -> F:
    """Let a function, or the constructor of a class, explain a keyword that it does not have."""
    if isinstance(function, type):  # of a dataclass, which makes its constructor itself
        type.__setattr__(function, "__init__", in_our_words(vars(function)["__init__"]))
        return function
    known = [name for name in inspect.signature(function).parameters if name != "self"]
    accepted, name = frozenset(known), function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def explained(*args: Any, **kwargs: Any) -> Any:
        if kwargs and not accepted.issuperset(kwargs):
            word = next(word for word in kwargs if word not in accepted)
            raise TypeError(f"{name} has no argument {word!r}: {instead(word, known)}")
        return function(*args, **kwargs)

    return cast(F, explained)
