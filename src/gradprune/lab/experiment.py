"""How does a long experiment survive a kill, and how does its result say where it came from?"""

from __future__ import annotations

import datetime
import importlib
import json
import math
import os
import platform
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from gradprune.core import files
from gradprune.lab.setup import progress_wanted, repository

Row = dict[str, Any]

_NETWORK = files.Kind("gradprune.network", "stored network", "a network stored by an experiment")


def run(
    path: Path, cells: Iterable[Row], measure: Callable[[Row], Row], *, seeds: Sequence[int], about: str = ""
) -> list[Row]:
    """Measure each cell that `path` does not hold yet, save after each, and return all rows in the order of `cells`.

    A cell is what identifies a row (JSON values only); `measure(cell)` returns what was measured of it. The file is
    JSON: `about`, `command`, `seeds`, `versions`, `machine`, `date`, `rows`. A run that was killed goes on where it
    stopped; a file of another torch version, or of other seeds, is measured anew from the start.

    Raises ValueError where `path` holds something else than such a result; it is left as it is.
    """
    cells = list(cells)
    keys = [_key(cell, cell) for cell in cells]
    head = provenance(seeds) | {"about": about}
    done = _by_key(_saved(path, head), cells)
    for key, cell in tqdm(list(zip(keys, cells, strict=True)), desc=path.stem, disable=not progress_wanted()):
        if key not in done:
            done[key] = cell | measure(cell)
            save(path, head | {"rows": [done[k] for k in keys if k in done]})
    return [done[key] for key in keys]


def provenance(seeds: Sequence[int]) -> dict[str, Any]:
    """Return the command, the seeds, the versions, the machine and the day of this run; no path and no host name."""
    return {
        "command": shlex.join(["python", *(re.sub(r"(?<![^=])/.*", _relative, word) for word in sys.argv)]),
        "seeds": list(seeds),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "numpy")},
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
    }


def machine() -> str:
    """Return the processor's name and the number of cores this process may use."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {usable} cores"


def save(path: Path, result: dict[str, Any]) -> None:
    """Write `result` as JSON beside `path`, then rename it, so that a kill never leaves half a file.

    Each entry has a line, and of `rows` each row, since the files are read as diffs. JSON has no number for what is not
    finite: such a float is written as "inf", "-inf" or "nan", and :func:`load` reads these as floats again.
    """
    entries = [f" {json.dumps(name)}: {_lines(name, value)}" for name, value in _spelled(result).items()]
    text = "{\n" + ",\n".join(entries) + "\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
        file.write(text)
    os.replace(file.name, path)
    os.chmod(path, 0o644)


def _lines(name: str, value: Any) -> str:
    """An entry's value as JSON."""
    if name != "rows" or not value:
        return json.dumps(value, allow_nan=False)
    return "[\n" + ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in value) + "\n ]"


def load(name: str) -> dict[str, Any]:
    """Return the result `name` from `chapters/results`.

    Raises FileNotFoundError with the command that makes it.
    """
    path = repository() / "chapters" / "results" / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(f"no {path.name}; `python chapters/experiments/{name}.py` measures and writes it")
    loaded: dict[str, Any] = _unspelled(json.loads(path.read_text()))
    return loaded


def script(name: str) -> ModuleType:
    """Return the experiment `name` of `chapters/experiments` as a module, for a part of it to be run again.

    Raises FileNotFoundError where there is none of that name.
    """
    folder = repository() / "chapters" / "experiments"
    if not (folder / f"{name}.py").exists():
        raise FileNotFoundError(f"no experiment {name!r}: chapters/experiments has no {name}.py")
    sys.path.insert(0, str(folder))  # experiments import each other
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


def store_network(path: Path, model: nn.Module) -> None:
    """Write a trained network's tensors to a safetensors file, with the command, versions, machine and day.

    Of tensors that are tied the first is written.
    """
    state = model.state_dict()
    files.write(path, _NETWORK, provenance([]), {name: state[name] for name in _own_names(state).values()})


def network(name: str, model: nn.Module) -> nn.Module:
    """Return `model` with the tensors of the trained network `name` of `chapters/results`, in eval mode.

    The last bits of a training differ from one processor to another, and a pruned network shows it. What a page says
    of one network is said of a stored one, so that it holds wherever the page runs.

    Raises FileNotFoundError with the command that makes the file, RuntimeError where the tensors are another network's.
    """
    path = repository() / "chapters" / "results" / f"{name}.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"no {path.name}; `python chapters/experiments/{name}.py` trains and writes it")
    stored = files.read(path, _NETWORK)[1]
    first, own = _own_names(model.state_dict()), model.state_dict()
    for name, value in own.items():  # those that are tied to another
        if name not in stored and first[value.data_ptr()] in stored:
            stored[name] = stored[first[value.data_ptr()]]
    model.load_state_dict(stored)
    return model.eval()


def _own_names(state: Mapping[str, Tensor]) -> dict[int, str]:
    """The first name of each place in memory."""
    names: dict[int, str] = {}
    for name, value in state.items():
        names.setdefault(value.data_ptr(), name)
    return names


def _saved(path: Path, head: dict[str, Any]) -> list[Row]:
    if not path.exists():
        return []
    try:
        old = _unspelled(json.loads(path.read_text()))
        same = old["versions"]["torch"] == head["versions"]["torch"] and old["seeds"] == head["seeds"]
        return list(old["rows"]) if same else []
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name} is not the result of an experiment; move it away to measure it anew") from error


def _by_key(rows: Iterable[Row], cells: Sequence[Row]) -> dict[str, Row]:
    """Rows by the cells they are of: of those whose values a row has, the cell that names most."""
    names = sorted({tuple(cell) for cell in cells}, key=len, reverse=True)
    keys = {_key(cell, cell) for cell in cells}
    found: dict[str, Row] = {}
    for row in rows:
        own = (_key(row, some) for some in names if row.keys() >= set(some))
        if key := next((key for key in own if key in keys), None):
            found[key] = row
    return found


def _key(row: Row, names: Iterable[str]) -> str:
    """A row's values of these names; of a cell's names, what tells it from the others."""
    return json.dumps({name: row[name] for name in sorted(names)})


_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def _spelled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _spelled(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_spelled(inner) for inner in value]
    return str(float(value)) if isinstance(value, float) and not math.isfinite(value) else value


def _unspelled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _unspelled(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_unspelled(inner) for inner in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _relative(path: re.Match[str]) -> str:
    full = Path(path[0]).resolve()
    return str(full.relative_to(Path.cwd())) if full.is_relative_to(Path.cwd()) else full.name
