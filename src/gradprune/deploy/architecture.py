"""What do the layers say of a checkpoint's tensors, where transformers can make the model that config.json names?

The model is made on the meta device, without values; no code but that of the installed library is run. It says which
tensors are weights, which of their axes is the output, and in which order they come, by which ties are resolved: so
masks are those of ``prune`` on the loaded model also where names would mislead. A file may have names of before, by
which transformers finds the tensors still; where it joins or splits tensors as it loads them, names have to do.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from gradprune.core.checkpoint import Checkpoint
from gradprune.core.layers import Weight, weights_of
from gradprune.core.quiet import quiet
from gradprune.deploy.names import is_matrix


class Asked(NamedTuple):
    """A model, and its weights by any of their names in the file, in its order."""

    model: str
    weights: dict[str, Weight]
    joined: str = ""  # a tensor that the model holds as a part of one, or as several: then there are no weights


def layers_of(checkpoint: Checkpoint) -> Asked | None:
    """Return what the model of a checkpoint says of its tensors; None where it cannot be made, or has other tensors."""
    kinds = checkpoint.config().get("architectures")
    if not (isinstance(kinds, list) and len(kinds) == 1 and isinstance(kinds[0], str)):
        return None
    if importlib.util.find_spec("transformers") is None:
        return None
    try:
        with quiet():
            model = _made(str(checkpoint.folder or checkpoint.path.parent), kinds[0])
    except Exception:  # whatever another library raises: then names have to do
        return None
    if model is None:
        return None
    weights = {name: weight for weight in weights_of(model).values() for name in weight.names}
    matrices = [t.entry.name for t in checkpoint.tensors.values() if is_matrix(t.entry)]
    if all(name in weights for name in matrices):
        return Asked(kinds[0], weights)
    try:
        called = _called(model, matrices)
    except Exception:  # before transformers 5 it is not there; it is no promise of theirs either
        return None
    joined = next((name for name, (_, other) in called.items() if other), "")
    if joined:
        return Asked(kinds[0], {}, joined)
    of_file = {now: name for name, (now, _) in called.items()}
    if len(of_file) < len(matrices) or not all(now in weights for now in of_file):
        return None
    return Asked(kinds[0], {of_file[now]: weight for now, weight in weights.items() if now in of_file})


def _called(model: Any, names: Iterable[str]) -> Mapping[str, tuple[str, bool]]:
    """What transformers calls a file's tensors as it loads them, and whether it makes others of them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    found = {}
    for name in names:
        now, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if now not in state and name in state:  # as it does
            now, pattern = name, None
        found[name] = now, pattern is not None
    return found


def _made(folder: str, kind: str) -> torch.nn.Module | None:
    import transformers
    from transformers.utils import logging

    said = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        known = getattr(transformers, kind, None)
        if not (isinstance(known, type) and issubclass(known, transformers.PreTrainedModel)):
            return None
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            made: torch.nn.Module = known(config)
        return made
    finally:
        logging.set_verbosity(said)
