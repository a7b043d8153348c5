"""How is a model's loss on data differentiated by its weights, without leaving a trace?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from gradprune.core.batches import described, items
from gradprune.core.checks import function, module, require, require_values
from gradprune.core.evaluate import arguments, as_written, evaluated, tensors_in
from gradprune.core.sharded import local

Batches = Iterable[tuple[Any, Any]]
Loss = Callable[[Any, Any], Tensor]


def floating(model: nn.Module, *, sharded: bool = False) -> dict[str, nn.Parameter]:
    """The floating and complex parameters by name, a tied one once.

    Raises where a trainable one cannot be read; a frozen one of that kind is left out. A DTensor can be, if `sharded`
    says that the caller knows of them.
    """
    found = {}
    for name, p in module(model).named_parameters():
        if p.is_floating_point() or p.is_complex():
            try:
                require_values(name, local(p) if sharded else p)
            except TypeError:
                if p.requires_grad:
                    raise
                continue
            found[name] = p
    return found


def entries(p: Tensor) -> Tensor:
    """The parameter's entries as a dense tensor of a dtype that torch calculates with."""
    dense = p.detach() if p.layout == torch.strided else p.detach().to_dense()
    return dense.float() if dense.element_size() == 1 else dense


@contextmanager
def trainable(model: nn.Module, *, sharded: bool = False) -> Iterator[dict[str, nn.Parameter]]:
    """The trainable parameters, while the model is in eval mode and gradients are on."""
    parameters = {name: p for name, p in floating(model, sharded=sharded).items() if p.requires_grad}
    require(bool(parameters), "no parameter of the model is trainable: requires_grad is False for all of them")
    with evaluated(model), as_written(), torch.enable_grad(), _checkpoints_differentiable():
        yield parameters


def pairs(batches: Batches) -> list[tuple[Any, Any]]:
    """The batches as a list of pairs (inputs, targets)."""
    kept = items(batches, "an iterable of pairs (inputs, targets)")
    for i, batch in enumerate(kept):
        if not (isinstance(batch, tuple | list) and len(batch) == 2):
            hint = ""
            if isinstance(batch, Mapping):
                hint = "; of dicts make pairs: [(d, d['labels']) for d in loader]"
            elif len(kept) == 2:
                hint = ", and batches, if it is one pair, [(inputs, targets)]"
            raise TypeError(f"batch {i} must be a pair (inputs, targets), got {described(batch)}{hint}")
    return [(batch[0], batch[1]) for batch in kept]


def single_samples(batch: tuple[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """The batch's samples as batches of one; what is no tensor, or one without a dimension, goes to each."""
    lengths = {len(t) for t in tensors_in(batch) if t.dim()}
    if not lengths:
        raise TypeError(f"to pass samples one by one, batches must hold tensors, got {described(batch)}")
    require(len(lengths) == 1, f"tensors of one batch must have as many rows as samples, got {sorted(lengths)} rows")
    for i in range(lengths.pop()):
        sample = slice(i, i + 1)
        yield map_tensors(lambda t: t[sample] if t.dim() else t, batch)  # noqa: B023 (used at once)


def map_tensors(change: Callable[[Tensor], Any], value: Any) -> Any:
    """The value with every tensor in its tuples, lists and dicts changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: map_tensors(change, v) for name, v in value.items()}
    if isinstance(value, tuple | list):
        parts = [map_tensors(change, v) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)  # a named tuple, or a plain one
    return value


def loss_of(run: Callable[..., Any], batch: tuple[Any, Any], loss: Loss) -> Tensor:
    """The loss of a batch, a real finite scalar that depends on what is trained."""
    function("loss", loss, hint="it is called as loss(outputs, targets)")
    if any(t.is_inference() for t in tensors_in(batch)):  # what no graph may hold
        batch = map_tensors(lambda t: t.clone() if t.is_inference() else t, batch)
    inputs, targets = batch
    args, kwargs = arguments(inputs)
    value = loss(run(*args, **kwargs), targets)
    if not isinstance(value, Tensor):
        raise TypeError(f"loss must return a scalar tensor, got {type(value).__name__}")
    require(value.numel() == 1, f"loss must return a scalar, got shape {tuple(value.shape)}")
    require(not value.is_complex(), "loss must be real, not complex; take its absolute value or its real part")
    if not value.requires_grad:
        raise ValueError("the loss does not depend on the trainable parameters: it was detached, or made without them")
    require(bool(value.isfinite()), f"the loss is {value.item()}: a score of it would have no order")
    return value.reshape(())


def run_with(model: nn.Module, tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """Run the model with other tensors, by name, in the place of its parameters and buffers.

    torch's own functional_call leaves them in a module that the model has under two names.
    """
    names = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    before: list[tuple[dict[str, Any], str, Tensor]] = [
        (held, attribute, t)
        for module in model.modules()
        for held in (cast(dict[str, Any], module._parameters), cast(dict[str, Any], module._buffers))
        for attribute, t in held.items()
        if t is not None and names.get(id(t)) in tensors
    ]
    try:
        for held, attribute, t in before:
            held[attribute] = tensors[names[id(t)]]
        return model(*args, **kwargs)
    finally:
        for held, attribute, t in before:
            held[attribute] = t


def gradients_of(value: Tensor, weights: list[Any], *, create_graph: bool = False) -> list[Tensor]:
    """Gradients without touching ``.grad``; zero where the value does not depend on a weight."""
    found = torch.autograd.grad(value, weights, create_graph=create_graph, allow_unused=True)
    if any(g is None for g in found):
        _refuse_checkpoints(value)
    return [
        torch.zeros_like(w) if g is None else g.to_dense() if g.layout != torch.strided else g
        for g, w in zip(found, weights, strict=True)
    ]


def require_other_weights(model: nn.Module, score: str) -> None:
    """Raise TypeError where a model cannot be run with other weights than its own."""
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise TypeError(f"{score} runs the model with other weights, which a scripted one cannot be: score it before")


@contextmanager
def _checkpoints_differentiable() -> Iterator[None]:
    """Run reentrant checkpoints, whose gradients only ``backward()`` gives, as those of the other kind."""
    kind = torch.utils.checkpoint.CheckpointFunction

    def apply(run: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)

    before = vars(kind).get("apply")
    try:
        kind.apply = staticmethod(apply)  # type: ignore[method-assign]
        yield
    finally:
        if before is not None:
            kind.apply = before  # type: ignore[method-assign]
        elif "apply" in vars(kind):
            del kind.apply


def _refuse_checkpoints(value: Tensor) -> None:
    """Raise where a checkpoint of a kind that is not torch's hides the weights inside it."""
    left, seen = [value.grad_fn], set()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "CheckpointFunction" in node.name():
            raise ValueError(
                "the model checkpoints a part of itself in a way that hides that part's gradients (reentrant): "
                "turn checkpointing off, or use torch.utils.checkpoint"
            )
        left += [following for following, _ in node.next_functions]
