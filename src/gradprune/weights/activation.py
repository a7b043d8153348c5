"""How large is what each weight multiplies (chapter 4)?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gradprune.core.batches import inputs_of, items
from gradprune.core.checks import require
from gradprune.core.evaluate import as_written, call_on_batch, evaluated
from gradprune.core.sharded import is_sharded
from gradprune.weights.activation_sharded import activation_over_ranks
from gradprune.weights.differentiate import floating
from gradprune.weights.input_norms import NO_SAMPLE, REACH_NONE, InputNorms, seen_kernels
from gradprune.weights.precision import product


def activation(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Return the weight's size times the size of what it multiplies: ``|w|`` times the norm of its input.

    The norm is Euclidean, over all samples and positions of `batches`. For a convolution the feature is the input
    channel, the same for every position of the kernel. A weight tied between layers gets the sum over them.

    Args:
        model: Any module. What a weight multiplies is seen operator by operator, so that it does not matter what kind
            of layer holds it, nor in which order of axes: linear and convolution layers, attention's joint matrices,
            recurrent layers, stacks of experts.
        batches: Pairs (inputs, targets), whose targets are not used, or inputs alone: tensors or dicts. Where
            parameters are DTensors (FSDP2, tensor parallel), all ranks call this together, as ``gradient``, and the
            norm is over the samples of all.

    Returns:
        The scores of the parameters of two dimensions or more that multiply something, and of no other.

    Raises:
        TypeError: The model is no module, a trainable parameter cannot be read, or batches are no iterable of batches.
        ValueError: There are no batches, or they reach no weight; an input is not finite, or too small or too large for
            its square to be held in float64.

    Example:
        >>> layer, x = nn.Linear(2, 1, bias=False), torch.tensor([[3.0, 0.0], [4.0, 0.0]])
        >>> _ = layer.weight.data.fill_(-1.0)
        >>> gp.activation(layer, [(x, None)])
        {'weight': tensor([[5., 0.]])}

    Sun et al. (2024), equation 1; chapter 4.
    """
    if is_sharded(model):
        return activation_over_ranks(model, batches)
    parameters = floating(model)
    inputs = items(inputs_of(batches), "an iterable of batches")
    norms = InputNorms(model)
    with evaluated(model), as_written(), torch.no_grad(), seen_kernels(model), norms.watching():
        for number, batch in enumerate(inputs):
            call_on_batch(model, batch, number)
    scores = {}
    for name, p in parameters.items():
        if p.dim() >= 2 and p.layout == torch.strided and (total := norms.of(p)) is not None:
            scores[name] = product(name, p.detach().abs(), total)
    require(bool(scores), REACH_NONE)
    require(norms.entries > 0, NO_SAMPLE)
    return scores
