"""Which entries of a gradient are sent to the other processes, and what becomes of the others?"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradprune.core import checks
from gradprune.core.words import in_our_words
from gradprune.gradients.feedback import Amount
from gradprune.gradients.params import Params, by_name, read_once
from gradprune.gradients.sparsify import not_finite
from gradprune.scale.bucket import Outgoing, spans

if TYPE_CHECKING or dist.is_available():
    from torch.distributed import GradBucket, ProcessGroup  # type: ignore[attr-defined]
else:  # torch can be built without, and the package is imported all the same
    GradBucket = ProcessGroup = type(None)

_KINDS = ("residuals", "velocities")
_DTYPES = (None, torch.float16, torch.bfloat16)


class TopK:
    """Let DistributedDataParallel send the large entries of the gradients only; what is left out waits on each rank.

    ``ddp.register_comm_hook(state, gp.TopK.hook)`` has it take the place of DDP's all-reduce. Each rank adds to its
    gradient what waits there, sends the largest entries of the sum, their places and values, by all-gather, and lets
    the others wait; all get the average over the ranks of what was sent, the same bits on each. Of each rank, what it
    has sent and what waits add up to its gradients. An optimizer and clips then act as they do after an all-reduce.

    Of each parameter the same share is sent, and at least one entry: a parameter stays the same where DDP builds its
    buckets anew, as after the first step, and so a run that is resumed goes on bit for bit. Where an optimizer holds
    pruned weights (:meth:`Masks.hold`), their gradients and what waits for them are zero before anything is chosen. A
    parameter whose gradient is zero on all ranks (that no rank used) takes no part in the step. Where any rank's
    gradient of a parameter is not finite, all ranks get NaN there, as all would from an all-reduce, and what waits for
    it stays as it is: a check after ``backward()``, as in :func:`clip_by_norm_`, then sees it on all of them.

    Worth it over a slow network: what a rank receives grows with their number, and by all-reduce it does not. Of
    float32, an all-reduce takes fewer bytes from a density of 1 / ranks on. Not with a gradient scaler, whose scale
    would change while entries wait; autocast to bfloat16 needs none.

    Args:
        params: the model that DDP was given, or DDP itself, or what :func:`keep_top_gradients_` takes; parameters that
            are not trained are passed over.
        density: the share of the entries to send, above 0 and at most 1, or a function of the number of steps taken,
            for a warm-up: ``lambda t: max(0.001, 0.25 ** (1 + t // 100))``. The same on all ranks.
        momentum: as for :class:`ErrorFeedback`: m in [0, 1), of what waits; the optimizer should have none then.
        dtype: torch.float16 or torch.bfloat16 to send wider values so; what rounding takes off them waits too.
        group: the process group, where DDP has another than the default.

    Raises:
        TypeError: for arguments of another kind, and parameters that are lazy, quantized or DTensors.
        ValueError: for numbers out of range, complex parameters, and where nothing is trained.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = nn.Linear(2, 1, bias=False)
        >>> ddp = nn.parallel.DistributedDataParallel(model)
        >>> state = gp.TopK(model, density=0.5)
        >>> ddp.register_comm_hook(state, gp.TopK.hook)
        >>> for _ in range(3):
        ...     model.zero_grad()
        ...     ddp(torch.tensor([[1.0, 0.6]])).sum().backward()
        ...     print(model.weight.grad)
        tensor([[1., 0.]])
        tensor([[0.0000, 1.2000]])
        tensor([[2., 0.]])
        >>> dist.destroy_process_group()

    Lin et al. (2018), section 3, for momentum and warm-up; what waits is explained in chapter 3.
    """

    @in_our_words
    def __init__(
        self,
        params: Params,
        density: Amount,
        *,
        momentum: float = 0.0,
        dtype: torch.dtype | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        params = read_once(params)
        if isinstance(params, nn.parallel.DistributedDataParallel):
            group, params = group or params.process_group, params.module
        if isinstance(density, type | nn.Module):
            raise TypeError("density must be a number or a function of the step, got a class or a model")
        self._density = density if callable(density) else _share("density", density)
        self._momentum = checks.number("momentum", momentum, least=0.0, below=1.0)
        self._dtype = checks.choice("dtype", dtype, _DTYPES)
        if group is not None and not isinstance(group, ProcessGroup):
            raise TypeError(f"group must be a process group, got {type(group).__name__}")
        self._group = group
        self._steps, self._agreed = 0, False
        self._bytes_sent = self._bytes_received = 0
        self._names: dict[Tensor, str] = {}
        for name, parameter in by_name(params).items():
            if not parameter.requires_grad:
                continue
            checks.require_readable(name, parameter)
            if parameter.is_complex():
                raise ValueError(f"the parameter {name!r} is complex, which cannot be sent in parts")
            self._names[parameter] = name
        if not self._names:
            raise ValueError("no parameter in params is trained: none has requires_grad")
        self._waiting = {kind: self._zeros() for kind in self._kinds}

    @staticmethod
    @torch.no_grad()
    def hook(state: TopK, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """What DDP calls for each of its buckets.

        Args:
            state: a TopK that knows the parameters.
            bucket: the gradients of some parameters, on this rank.

        Returns:
            The future of their average over all ranks of what was sent.
        """
        return state._send(bucket)

    @property
    def steps(self) -> int:
        """How many steps were taken: backward passes in which gradients were sent."""
        return self._steps

    @property
    def bytes_sent(self) -> int:
        """How many bytes this rank has given to be sent to each of the others."""
        return self._bytes_sent

    @property
    def bytes_received(self) -> int:
        """How many bytes this rank has got from the others."""
        return self._bytes_received

    @property
    def residuals(self) -> Mapping[str, Tensor]:
        """What waits for each parameter on this rank, by name; to look at, not to change."""
        return MappingProxyType(self._waiting["residuals"])

    def state_dict(self) -> dict[str, Any]:
        """Steps and, under this rank's own key, what waits here: each rank saves its own.

        The key differs from rank to rank, so ``torch.distributed.checkpoint`` keeps the part of each.
        """
        rank, ranks = self._place()
        own = {kind: {name: t.clone() for name, t in waiting.items()} for kind, waiting in self._waiting.items()}
        return {"steps": self._steps, "ranks": ranks, _key(rank): own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state` was taken: bit for bit on as many ranks as saved it.

        On another number of ranks it needs the parts of all, as ``states[0] | states[1]`` joins them and
        ``torch.distributed.checkpoint.format_utils.dcp_to_torch_save`` does. Each rank then starts from the average of
        what waited on the old ones: as the gradients are averaged, the weights have the same way before them.

        Args:
            state: what ``state_dict()`` returned on this rank, or of all ranks joined.

        Raises:
            TypeError, ValueError: before anything is changed, where it is not a state of this class, lacks the part of
                a rank, is of other parameters, has a value that is not finite, or has velocities and this has no
                momentum, or the reverse.
        """
        state = checks.state(state, {"steps": int, "ranks": int}, "TopK")
        steps, saved = checks.whole("steps", state["steps"], least=0), checks.whole("ranks", state["ranks"], least=1)
        rank, ranks = self._place()
        wanted = [rank] if saved == ranks else range(saved)
        if lacking := [r for r in wanted if _key(r) not in state]:
            raise ValueError(
                f"the state of {saved} ranks lacks the part of rank {lacking[0]}: on rank {rank} of {ranks}, give "
                "what this rank saved itself, or the states of all joined, states[0] | states[1]"
            )
        parts = [self._checked(state[_key(r)], r) for r in wanted]
        for kind, waiting in self._waiting.items():
            for name, tensor in waiting.items():
                mean = torch.stack([part[kind][name].to(tensor) for part in parts]).mean(0)
                tensor.copy_(mean)
        self._steps = steps

    @property
    def _kinds(self) -> tuple[str, ...]:
        return _KINDS if self._momentum else _KINDS[:1]

    def _zeros(self) -> dict[str, Tensor]:
        return {
            name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False)
            for p, name in self._names.items()
        }

    def _place(self) -> tuple[int, int]:
        """This rank and how many there are."""
        if not (dist.is_available() and dist.is_initialized()):
            return 0, 1
        return dist.get_rank(self._group), dist.get_world_size(self._group)

    def _checked(self, part: Any, rank: int) -> Mapping[str, Any]:
        called = f"part of rank {rank} in the state"
        part = checks.state(part, dict.fromkeys(self._kinds, Mapping), "TopK")
        if part.keys() != set(self._kinds):
            raise ValueError(f"the {called} has velocities, and momentum here is 0")
        for kind in self._kinds:
            found, own = part[kind], self._waiting[kind]
            if found.keys() != own.keys():
                differing = sorted(map(str, found.keys() ^ own.keys()))
                raise ValueError(f"the {called} is of other parameters: {differing[0]!r} is not in both")
            for name, tensor in found.items():
                if not isinstance(tensor, Tensor) or tensor.shape != own[name].shape or not tensor.is_floating_point():
                    what = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                    raise ValueError(f"the {called}: {kind} of {name!r} are {what}, not {tuple(own[name].shape)}")
            if wrong := not_finite(found):
                raise ValueError(f"the {called}: {kind} of {wrong[0]!r} are not finite")
        return part  # type: ignore[no-any-return]

    def _send(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        buffer, steps = bucket.buffer(), self._steps
        if buffer.layout != torch.strided:
            raise TypeError(f"a gradient is sparse ({buffer.layout}): make the embedding dense, sparse=False")
        density = self._density
        if callable(density):
            density = _share(f"density at step {steps}", density(steps))
        self._require_agreement(density)
        if bucket.is_last():
            self._steps += 1
        outgoing = Outgoing(buffer, spans(bucket, self._names), self._waiting, density, self._momentum, self._dtype)
        packed, ranks = outgoing.message.packed(), self._place()[1]
        rows = packed.new_empty(ranks, packed.numel())
        self._bytes_sent += packed.numel()
        self._bytes_received += (ranks - 1) * packed.numel()
        work = dist.all_gather(list(rows.unbind()), packed, group=self._group, async_op=True)
        assert work is not None
        future: torch.futures.Future[Tensor] = work.get_future().then(
            lambda _: outgoing.receive(outgoing.message.unpacked(rows))
        )
        return future

    def _require_agreement(self, density: float) -> None:
        """Raise on all ranks, once, where they would send messages of different forms and wait for ever."""
        if self._agreed:
            return
        settings = (density, self._momentum, str(self._dtype), self._steps)
        device = next(iter(self._names)).device
        own = torch.tensor([zlib.crc32(repr(settings).encode())], device=device)
        every = [torch.empty_like(own) for _ in range(self._place()[1])]
        dist.all_gather(every, own, group=self._group)
        if any(int(other) != int(own) for other in every):
            raise ValueError(
                "density, momentum, dtype and the number of steps taken must be the same on all ranks; here they are "
                f"{settings}"
            )
        self._agreed = True


# DDP compares those of a hook with the types themselves.
TopK.hook.__annotations__.update({"bucket": GradBucket, "return": torch.futures.Future[Tensor]})


def _share(called: str, value: Any) -> float:
    return checks.number(called, value, above=0.0, most=1.0)


def _key(rank: int) -> str:
    return f"rank {rank}"
