"""What do the layers say of a checkpoint's tensors, where transformers can make the model that config.json names?

The model is made on the meta device, without values; no code but that of the installed library is run. It says which
tensors are weights, which of their axes is the output, and in which order they come, by which ties are resolved: so
masks are those of ``prune`` on the loaded model also where names would mislead.
"""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch

from gradprune.core.checkpoint import Checkpoint
from gradprune.core.layers import Weight, weights_of
from gradprune.deploy.names import is_matrix


class Asked(NamedTuple):
    """A model, and its weights by any of their names, in its order."""

    model: str
    weights: dict[str, Weight]


def layers_of(checkpoint: Checkpoint) -> Asked | None:
    """Return what the model of a checkpoint says of its tensors; None where it cannot be made, or has other names."""
    kinds = checkpoint.config().get("architectures")
    if not (isinstance(kinds, list) and len(kinds) == 1 and isinstance(kinds[0], str)):
        return None
    if importlib.util.find_spec("transformers") is None:
        return None
    try:
        model = _made(str(checkpoint.folder or checkpoint.path.parent), kinds[0])
    except Exception:  # whatever another library raises: then names have to do
        return None
    if model is None:
        return None
    weights = {name: weight for weight in weights_of(model).values() for name in weight.names}
    matrices = [t.entry.name for t in checkpoint.tensors.values() if is_matrix(t.entry)]
    return Asked(kinds[0], weights) if all(name in weights for name in matrices) else None


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
