"""Which data do the chapters measure on, and which part of it may be looked at when?"""

from __future__ import annotations

import http.client
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Inputs `x`, float32 of shape (examples, features), and class labels `y`, int64 of shape (examples,)."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def double(self) -> Split:
        """Return the same examples with inputs in double precision."""
        return Split(self.x.double(), self.y)


@dataclass(frozen=True)
class Dataset:
    """Three parts that share no example: fit on `train`, choose on `validation`, report on `test`, once."""

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int

    @property
    def features(self) -> int:
        """The length of one input."""
        return int(self.train.x.shape[1])


def load(name: str, *, seed: int = 0, validation: float = 0.2) -> Dataset:
    """Return the data set `name`: "digits", "mnist1d" or "mnist".

    digits: 1,797 handwritten digits of 8 by 8 pixels, shipped with scikit-learn; a fifth of them is the test part.
    mnist1d: 5,000 generated signals of 40 values, 4,000 for training and 1,000 for testing (Greydanus and Kobak 2024).
    mnist: 70,000 digits of 28 by 28 pixels, the last 10,000 for testing; fetched from OpenML, so it needs a network
    once.

    `validation` is the share of the training examples kept for choosing; `seed` decides which those are (for digits
    also which are the test part). Inputs are shifted and scaled by the mean and the standard deviation of the training
    part.

    Raises ValueError for an unknown name, for a share outside (0, 1) or one that leaves a part empty, ConnectionError
    where MNIST cannot be fetched.
    """
    if name not in _SOURCES:
        raise ValueError(f"unknown data set {name!r}; known are {', '.join(map(repr, _SOURCES))}")
    if not 0 < validation < 1:
        raise ValueError(f"validation is a share between 0 and 1, not {validation}")
    x, y, test_x, test_y = _SOURCES[name](seed)
    order = np.random.default_rng(seed).permutation(len(y))
    held = round(validation * len(y))
    if not 0 < held < len(y):
        raise ValueError(f"a share of {validation} of {len(y)} training examples leaves a part without any")
    kept_x, kept_y = x[order[held:]], y[order[held:]]
    mean, std = float(kept_x.mean()), float(kept_x.std())

    def split(x: np.ndarray, y: np.ndarray) -> Split:
        return Split(torch.from_numpy(((x - mean) / std).astype(np.float32)), torch.from_numpy(y.astype(np.int64)))

    return Dataset(
        name, split(kept_x, kept_y), split(x[order[:held]], y[order[:held]]), split(test_x, test_y), int(y.max()) + 1
    )


def recall(steps: int, *, seed: int = 0, examples: int = 2_000) -> Dataset:
    """Return sequences whose label is the sign of their first value: what a network must carry over all other steps.

    `x` is of shape (examples, steps, 1): a first value of -1 or 1, then standard normal noise. Half as many examples
    again are the validation part, and as many the test part; all are drawn from `seed`. The noise says nothing about
    the label.

    Raises ValueError for fewer than one step. The task is a short form of the one of Hochreiter and Schmidhuber (1997).
    """
    if steps < 1:
        raise ValueError(f"a sequence needs at least one step, not {steps}")
    generator = np.random.default_rng(seed)

    def draw(count: int) -> Split:
        x = generator.standard_normal((count, steps, 1)).astype(np.float32)
        y = generator.integers(0, 2, count)
        x[:, 0, 0] = 2 * y - 1
        return Split(torch.from_numpy(x), torch.from_numpy(y))

    return Dataset(f"recall-{steps}", draw(examples), draw(examples // 2), draw(examples // 2), 2)


def cache_folder() -> Path:
    """Where generated and fetched data stay: `GRADPRUNE_DATA`, or `gradprune` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradprune"
    return Path(os.environ.get("GRADPRUNE_DATA") or default).expanduser()


Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _digits(seed: int) -> Arrays:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(1_000 + seed).permutation(len(y))
    cut = len(y) // 5
    test, train = order[:cut], order[cut:]
    return x[train], y[train], x[test], y[test]


def _mnist1d(seed: int) -> Arrays:
    path = cache_folder() / "mnist1d-seed42-5000.npz"
    arrays = _saved(path)
    if arrays is None:
        arrays = _generate_mnist1d()
        _save(path, arrays)
    return arrays["x"], arrays["y"], arrays["x_test"], arrays["y_test"]


def _saved(path: Path) -> dict[str, np.ndarray] | None:
    """What `path` holds, or None where it is missing or damaged: then it is made again."""
    try:
        with np.load(path, allow_pickle=False) as saved:
            return {key: saved[key] for key in ("x", "y", "x_test", "y_test")}
    except (OSError, EOFError, KeyError, ValueError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error):
        return None


def _generate_mnist1d() -> dict[str, np.ndarray]:
    import random

    from mnist1d.data import get_dataset_args, make_dataset

    states = np.random.get_state(), random.getstate()  # noqa: NPY002 - the generator it seeds and draws from
    try:
        made = make_dataset(get_dataset_args())
    finally:
        np.random.set_state(states[0])  # noqa: NPY002
        random.setstate(states[1])
    return {key: np.asarray(made[key]) for key in ("x", "y", "x_test", "y_test")}


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        try:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # the stubs mistake the arrays for its flag
        except BaseException:
            os.unlink(file.name)
            raise
    os.replace(file.name, path)


def _mnist(seed: int) -> Arrays:
    from sklearn.datasets import fetch_openml

    try:
        x, y = fetch_openml("mnist_784", version=1, return_X_y=True, as_frame=False, data_home=str(cache_folder()))
    except (OSError, http.client.HTTPException) as error:  # URLError and the socket errors are OSErrors
        raise ConnectionError(
            f"MNIST could not be fetched from OpenML ({error}); it needs a network once and is then kept in "
            f"{cache_folder()}. Without one use load('digits') or load('mnist1d'), which need none."
        ) from error
    x, y = np.asarray(x, dtype=np.float32), np.asarray(y).astype(np.int64)
    return x[:60_000], y[:60_000], x[60_000:], y[60_000:]


_SOURCES: dict[str, Callable[[int], Arrays]] = {"digits": _digits, "mnist1d": _mnist1d, "mnist": _mnist}
