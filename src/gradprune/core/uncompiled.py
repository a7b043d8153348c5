"""How does a function stay out of torch.compile, without importing the compiler only to say so?"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function such that torch.compile runs it as it is, as ``torch.compiler.disable`` does.

    That decorator imports the compiler where it is written, which takes seconds.
    """
    disabled: list[Callable[P, R]] = []

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    # What the compiler looks at before it calls a function; torch.compiler.disable sets the same.
    run._torchdynamo_disable = True  # type: ignore[attr-defined]
    run._torchdynamo_disable_msg = "gradprune works on NumPy arrays here"  # type: ignore[attr-defined]
    return run
