"""What makes a run of a chapter give the same numbers twice?"""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import torch


def start(seed: int = 0) -> None:
    """Make what follows repeatable: seeds, one thread, deterministic algorithms, the CPU, no progress bars under test.

    `seed` seeds Python, NumPy and torch. Torch promises the same numbers on one version and one kind of machine only,
    so the chapters print rounded numbers. Call it in the first cell of a notebook.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - mnist1d draws from the global generator
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_default_device(None)  # the CPU; naming it would slow down every call into torch
    if not progress_wanted():
        os.environ["TQDM_DISABLE"] = "1"  # of bars that are not the lab's


def device() -> torch.device:
    """Return the GPU for the cells that may use one, else the CPU.

    The environment variable `GRADPRUNE_DEVICE` ("cpu", "cuda", "mps") overrides the choice. Apple's "mps" is taken only
    when asked for, since it has no float64, in which some chapters compute.
    """
    asked = os.environ.get("GRADPRUNE_DEVICE")
    if asked:
        return torch.device(asked)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu")


def progress_wanted() -> bool:
    """Whether to draw progress bars: not under a test, and not in the pages of the book."""
    return not any(os.environ.get(name) for name in ("PYTEST_CURRENT_TEST", "GRADPRUNE_QUIET", "CI"))


def repository() -> Path:
    """Return the folder that holds `chapters` and `book`: here, above here, above the package, or within it.

    An installed package carries the book's statements, its experiments and their results, so that a chapter that was
    downloaded by itself finds them.

    Raises FileNotFoundError where there is none.
    """
    here = Path.cwd()
    package = Path(__file__)
    for folder in (here, *here.parents, *package.parents, package.parent / "shipped"):
        if (folder / "book" / "claims.yml").is_file() and (folder / "chapters").is_dir():
            return folder
    raise FileNotFoundError("the book's files are neither here nor in the package: install gradprune again")
