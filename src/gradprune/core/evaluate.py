"""How is a model run for a look at it, and left as it was?"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gradprune.core.batches import described


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode; modes, buffers and torch's random state are restored at the end.

    Outside inference mode, where nothing can be differentiated or seen operator by operator.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module._buffers, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}  # pragma: no mutate: needs CUDA
    restored = torch.random.fork_rng(devices=devices)  # pragma: no mutate: needs CUDA
    with restored, torch.inference_mode(False), _no_cached_casts():
        try:
            with suppress(NotImplementedError):  # an exported graph has one mode only
                model.eval()
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for held, name, buffer, before in buffers:
                if held[name] is not buffer:
                    held[name] = buffer
                with torch.no_grad(), torch.inference_mode(buffer.is_inference()):
                    buffer.copy_(before)


def as_written() -> AbstractContextManager[Any]:
    """Run compiled models as they were written: compiled, they pass by the hooks that were set since.

    Only where the compiler was loaded: who has compiled anything has loaded it.
    """
    stance = getattr(torch.compiler, "set_stance", None)
    loaded = stance is not None and "torch._dynamo" in sys.modules
    return stance("force_eager") if loaded else nullcontext()  # type: ignore[misc]


def call(model: nn.Module, inputs: Any) -> Any:
    """Run the model on a tensor, or on a tuple, list or dict of its arguments."""
    args, kwargs = arguments(inputs)
    return model(*args, **kwargs)


def call_on_batch(model: nn.Module, batch: Any, number: int) -> Any:
    """Run the model on one of a caller's batches; what the model's operators do not take is an error that names it."""
    try:
        return call(model, batch)
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, IndexError) as error:
        raise ValueError(
            f"{type(model).__name__} does not run on batch {number}, {described(batch)}. It raises "
            f"{type(error).__name__}: {error}"
        ) from error


class NoExample(ValueError):
    """The model raises on the example that its caller gave."""


def call_on(model: nn.Module, example: Any) -> Any:
    """Run the model on what is said to be its input; an error that shows both where it raises."""
    try:
        return call(model, example)
    except Exception as error:
        raise NoExample(
            f"{type(model).__name__} does not run on the example, {described(example)}, which must be its input: a "
            f"tensor, or a tuple or dict of its arguments. It raises {type(error).__name__}: {error}"
        ) from error


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs as positional and named arguments."""
    if isinstance(inputs, Mapping):
        if not all(isinstance(name, str) for name in inputs):
            raise TypeError(f"a dict of inputs holds the model's arguments by name, got keys {list(inputs)!r:.60}")
        return (), dict(inputs)
    several = isinstance(inputs, tuple | list) and not isinstance(inputs, PackedSequence)
    return (tuple(inputs), {}) if several else ((inputs,), {})


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as products and a softmax: the fused kernels have no second derivative and hide what they multiply."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with plain_layers(), sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def plain_layers() -> Iterator[None]:
    """Without the one kernel for a whole attention layer, in which no product of a weight is seen."""
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Without the fused kernels of recurrent and attention layers, in which no product is seen."""
    with ExitStack() as stack:
        stack.enter_context(_disabled(torch.backends.mkldnn))
        stack.enter_context(_disabled(torch.backends.cudnn))
        stack.enter_context(plain_attention())
        yield


@contextmanager
def _disabled(backend: Any) -> Iterator[None]:
    before = backend.enabled
    try:
        backend.enabled = False
        yield
    finally:
        backend.enabled = before


@contextmanager
def _no_cached_casts() -> Iterator[None]:
    """Under autocast, casts of weights made before are not seen, and those made here must not outlast it."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()
