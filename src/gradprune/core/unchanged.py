"""How does a model come back to what it was, bit by bit, whatever was done with it?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn


class Keeper:
    """A model that is put back again and again: its modules and parameters, looked up once."""

    def __init__(self, model: nn.Module) -> None:
        self.modules, self.parameters = list(model.modules()), list(model.parameters())

    @contextmanager
    def unchanged(self, parameters: Iterable[nn.Parameter] = ()) -> Iterator[None]:
        """Put back, at the end or at an exception, what may have changed inside.

        That is the values of the parameters that are named, all buffers, the modes and the gradients; of the gradients
        there are none inside, so that a training there adds nothing to those from before.
        """
        modes = {module: module.training for module in self.modules}
        gradients = [(p, p.grad) for p in self.parameters]
        buffers = [
            (module._buffers, name, buffer)
            for module in self.modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        tensors: list[Tensor] = [*parameters, *(buffer for _, _, buffer in buffers)]
        before = [tensor.detach().clone() for tensor in tensors]

        def put_back() -> None:
            for module, mode in modes.items():
                if module.training != mode:  # a module is slow to take an attribute
                    module.training = mode
            for parameter, gradient in gradients:
                if parameter.grad is not gradient:
                    parameter.grad = gradient
            for held, name, buffer in buffers:
                if held.get(name) is not buffer:
                    held[name] = buffer
            for inference in (False, True):
                with torch.inference_mode(inference), torch.no_grad():
                    for tensor, values in zip(tensors, before, strict=True):
                        if tensor.is_inference() == inference:
                            tensor.copy_(values)

        try:
            for parameter, gradient in gradients:
                if gradient is not None:
                    parameter.grad = None
            yield
        finally:
            try:
                put_back()
            except BaseException:  # a signal's, between two tensors
                put_back()
                raise


def unchanged(model: nn.Module, parameters: Iterable[nn.Parameter] = ()) -> AbstractContextManager[None]:
    """Put a model back once, as ``Keeper.unchanged`` says."""
    return Keeper(model).unchanged(parameters)
