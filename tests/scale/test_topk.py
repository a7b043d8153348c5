"""gp.TopK over several processes, against what one process computes in a few lines."""

import copy
import itertools
import tempfile
from pathlib import Path

import group
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradprune as gp

SMALL = 0.0002  # megabytes a bucket: several of them, built anew after the first step


def net(seed=0, dtype=torch.float32):
    """With a weight whose strides are not by rows, a scalar, an empty parameter."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(72, 20), nn.ReLU(), nn.Linear(20, 4))
    model.to(memory_format=torch.channels_last)
    model.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))
    model.register_parameter("nothing", nn.Parameter(torch.empty(0, 3)))
    forward = model.forward
    model.forward = lambda x: forward(x) * model.scale + model.nothing.sum()
    return model.to(dtype)


def batch(rank, step, dtype=torch.float32):
    made = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(6, 3, 5, 5, generator=made).to(dtype)


def hooked(model, density, *, group=None, unused=False, **options):
    ddp = DistributedDataParallel(model, bucket_cap_mb=SMALL, process_group=group, find_unused_parameters=unused)
    state = gp.TopK(ddp, density, **options)
    ddp.register_comm_hook(state, gp.TopK.hook)
    return ddp, state


def own_gradients(model, inputs):
    """What this rank alone would have."""
    alone = copy.deepcopy(model)
    alone.forward = lambda x: nn.Sequential.forward(alone, x) * alone.scale + alone.nothing.sum()
    alone.zero_grad()
    alone(inputs).square().sum().backward()
    return {name: p.grad for name, p in alone.named_parameters()}


def backward(ddp, inputs):
    ddp.zero_grad()
    ddp(inputs).square().sum().backward()
    return {name: p.grad.clone() for name, p in ddp.module.named_parameters()}


def step(model):
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(p.grad, alpha=1e-3)


def of_all(tensor, group=None):
    every = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, tensor.contiguous(), group=group)
    return every


def check_equal_on_all(tensors):
    for name, tensor in tensors.items():
        assert all(torch.equal(other, tensor) for other in of_all(tensor)), name


def top(values, count):
    """The largest by magnitude, the later of equals, by a plain sort."""
    flat = values.reshape(-1)
    order = sorted(range(flat.numel()), key=lambda i: (float(flat[i].abs()), i))[flat.numel() - count :]
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[order] = True
    return mask.view(values.shape)


def at_density_1_it_is_an_all_reduce(rank, ranks):
    plain = DistributedDataParallel(net(), bucket_cap_mb=SMALL)
    ddp, state = hooked(net(), 1.0)
    for at in range(3):
        wanted, found = backward(plain, batch(rank, at)), backward(ddp, batch(rank, at))
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)
            if ranks == 2:  # DDP divides first, which is exact by 2
                assert torch.equal(found[name], gradient), name
        check_equal_on_all(found)
        step(ddp.module)
        step(plain.module)
    assert not any(r.any() for r in state.residuals.values())
    assert state.steps == 3


def it_is_what_one_process_computes(rank, ranks):
    for momentum in (0.0, 0.7):
        ddp, state = hooked(net(), lambda t: (0.5, 0.2)[t > 0], momentum=momentum)
        waiting, velocities = {}, {}
        for at in range(4):
            wanted = {name: torch.zeros_like(p) for name, p in ddp.module.named_parameters()}
            for r in range(ranks):
                for name, g in own_gradients(ddp.module, batch(r, at)).items():
                    key, size = (name, r), g.numel()
                    velocities[key] = momentum * velocities.get(key, 0) + g
                    total = waiting.get(key, 0) + velocities[key]
                    mask = top(total, max(round((0.2 if at else 0.5) * size), min(size, 1)))
                    wanted[name] += total * mask / ranks
                    waiting[key], velocities[key] = total * ~mask, velocities[key] * ~mask
            found = backward(ddp, batch(rank, at))
            for name, gradient in wanted.items():
                torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(state.residuals[name], waiting[name, rank], rtol=1e-4, atol=1e-5)
            check_equal_on_all(found)
            step(ddp.module)
        check_equal_on_all(dict(ddp.module.named_parameters()))


def what_is_sent_and_what_waits_is_what_came_in(rank, ranks):
    for dtype, sent_as in itertools.product((torch.float64, torch.float32, torch.bfloat16), (None, torch.float16)):
        ddp, state = hooked(net(dtype=dtype), 0.1, dtype=sent_as)
        names = [name for name, _ in ddp.module.named_parameters()]
        came, sent = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        for at in range(3):
            inputs = batch(rank, at, dtype) * (1e3 if at else 1)  # beyond the range of float16
            own = own_gradients(ddp.module, inputs)
            for name, gradient in backward(ddp, inputs).items():
                came[name] = came[name] + own[name].double()
                sent[name] = sent[name] + gradient.double() * ranks
        for name in names:
            total = sum(of_all(came[name]))
            waits = sum(of_all(state.residuals[name].double()))
            close = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0.01}[dtype]  # sent is an average here
            largest = max(float(total.abs().max()), 1e-30) if total.numel() else 1.0
            torch.testing.assert_close((sent[name] + waits) / largest, total / largest, rtol=0, atol=3 * close)
        if dtype == torch.float32 and sent_as:
            assert (
                float(max(r.abs().max() for r in state.residuals.values() if r.numel())) > 65504
            )  # waits, not infinite


def no_dtype_that_is_not_shorter_is_sent(rank, ranks):
    ddp, state = hooked(net(dtype=torch.bfloat16), 1.0, dtype=torch.float16)
    found = backward(ddp, batch(rank, 0, torch.bfloat16) * 1e3)
    assert max(g.abs().max() for g in found.values() if g.numel()) > 65504  # beyond the range of float16
    assert not any(r.any() for r in state.residuals.values())


def every_byte_is_counted(rank, ranks):
    given, gather = [], dist.all_gather

    def counted(outputs, own, **options):
        given.append((own.numel() * own.element_size(), sum(o.numel() * o.element_size() for o in outputs)))
        return gather(outputs, own, **options)

    for dtype, width in ((None, 4), (torch.float16, 2), (torch.bfloat16, 2)):
        ddp, state = hooked(net(), 0.1, dtype=dtype)
        backward(ddp, batch(rank, 0))
        before = state.bytes_sent, state.bytes_received
        given.clear()
        dist.all_gather = counted
        try:
            backward(ddp, batch(rank, 1))
        finally:
            dist.all_gather = gather
        assert len(given) > 2  # of the size that was asked, there are several buckets
        sent = state.bytes_sent - before[0]
        assert sent == sum(own for own, _ in given)
        assert state.bytes_received - before[1] == sum(received for _, received in given) - sent
        sizes = [p.numel() for p in ddp.module.parameters()]
        entries = sum(max(round(0.1 * size), min(size, 1)) for size in sizes)
        assert sent == entries * (4 + width) + len(sizes)


def a_run_resumes_bit_for_bit(rank, ranks):
    import torch.distributed.checkpoint as checkpoint

    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    ddp, state = hooked(net(), lambda t: 0.3 / (1 + t), momentum=0.5)
    for at in range(3):
        backward(ddp, batch(rank, at))
        step(ddp.module)
    weights = copy.deepcopy(ddp.module.state_dict())
    file = Path(folder[0]) / f"{rank}.pt"
    torch.save(state.state_dict(), file)
    checkpoint.save({"topk": state.state_dict()}, checkpoint_id=Path(folder[0]) / "all")
    expected = [backward(ddp, batch(rank, at)) for at in range(3, 6)]

    for kind in ("file", "checkpoint"):
        again, other = hooked(net(1), lambda t: 0.3 / (1 + t), momentum=0.5)
        again.module.load_state_dict(weights)
        if kind == "file":
            read = torch.load(file, weights_only=True)
        else:
            whole = {"topk": other.state_dict()}
            checkpoint.load(whole, checkpoint_id=Path(folder[0]) / "all")
            read = whole["topk"]
        other.load_state_dict(read)
        assert other.steps == 3
        for at in range(3, 6):
            found = backward(again, batch(rank, at))
            assert all(torch.equal(found[name], g) for name, g in expected[at - 3].items()), (kind, at)
        assert all(torch.equal(other.residuals[name], r) for name, r in state.residuals.items())


def what_two_ranks_saved_is_loaded_on_any_number(rank, ranks):
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    folder = Path(folder[0])
    pair = dist.new_group([ranks - 2, ranks - 1])
    if rank >= ranks - 2:
        ddp, state = hooked(net(), 0.2, group=pair)
        for at in range(3):
            backward(ddp, batch(rank, at))
        torch.save(state.state_dict(), folder / f"{dist.get_rank(pair)}.pt")
        checkpoint.save({"topk": state.state_dict()}, checkpoint_id=folder / "all", process_group=pair)
        if dist.get_rank(pair) == 0:
            dcp_to_torch_save(folder / "all", folder / "all.pt")
    dist.barrier()
    parts = [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(2)]
    ddp, state = hooked(net(), 0.2)
    if ranks != 2:
        before = {name: r.clone() for name, r in state.residuals.items()}
        for wrong in parts:
            with pytest.raises(ValueError, match=r"lacks the part of rank \d: on rank"):
                state.load_state_dict(wrong)
        assert all(torch.equal(before[name], r) for name, r in state.residuals.items())
    for joined in (parts[0] | parts[1], torch.load(folder / "all.pt", weights_only=True)["topk"]):
        state.load_state_dict(joined)
        assert state.steps == 3
        for name, residual in state.residuals.items():
            saved = [part[f"rank {r}"]["residuals"][name] for r, part in enumerate(parts)]
            waits = sum(of_all(residual)) / ranks
            torch.testing.assert_close(waits, sum(saved) / 2)
            assert torch.equal(residual, saved[rank] if ranks == 2 else sum(saved) / 2)
    check_equal_on_all(backward(ddp, batch(rank, 3)))


def pruned_weights_take_no_part(rank, ranks):
    model = net()
    ddp, state = hooked(model, 0.1, momentum=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    backward(ddp, batch(rank, 0))
    masks = gp.prune(model, sparsity=0.8, scope="layer")  # of what waits already, too
    masks.hold(optimizer)
    for at in range(1, 4):
        found = backward(ddp, batch(rank, at))
        for name, mask in masks.items():
            assert not found[name][~mask].any(), name
            assert not state.residuals[name][~mask].any(), name
            assert found[name][mask].any(), name
            kept = sum(int((g != 0).sum()) for g in of_all(found[name][mask]))
            assert kept >= round(0.1 * mask.numel()) * 0.9, name  # none of what is sent is spent on pruned weights
        optimizer.step()
    assert masks.holds(model)
    check_equal_on_all(dict(model.named_parameters()))


def a_gradient_that_is_not_finite_on_one_rank_is_nan_on_all(rank, ranks):
    ddp, state = hooked(net(), 0.1, momentum=0.5)
    backward(ddp, batch(rank, 0))
    before = copy.deepcopy(state.state_dict())
    inputs = batch(rank, 1)
    if rank == ranks - 1:
        inputs[0, 0, 0, 0] = torch.inf
    found = backward(ddp, inputs)
    assert found["0.weight"].isnan().all()
    with pytest.raises(ValueError, match="not finite"):
        gp.clip_by_norm_(ddp, 1.0)
    key = f"rank {rank}"
    for name, gradient in found.items():
        if gradient.isnan().any():
            assert all(
                torch.equal(before[key][kind][name], state.state_dict()[key][kind][name]) for kind in before[key]
            )
    found = backward(ddp, batch(rank, 2))
    assert all(g.isfinite().all() for g in found.values())
    check_equal_on_all(found)


class TwoWays(nn.Module):
    """Takes the first way or the second."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, x, first):
        return (self.first if first else self.second)(x).square().sum()


def what_waits_for_a_parameter_that_no_rank_used_goes_on_waiting(rank, ranks):
    torch.manual_seed(0)
    model = TwoWays()
    ddp, state = hooked(model, 0.2, unused=True)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(rank))
    ddp(x, first=True).backward()
    waits = state.residuals["first.weight"].clone()
    assert waits.any()
    model.zero_grad()
    ddp(x, first=False).backward()
    assert model.first.weight.grad is None
    assert torch.equal(state.residuals["first.weight"], waits)
    model.zero_grad()
    ddp(x, first=rank == 0).backward()  # one rank uses it, and all send what waits for it
    assert not torch.equal(state.residuals["first.weight"], waits)
    check_equal_on_all({name: p.grad for name, p in model.named_parameters()})


def what_ranks_do_not_agree_on_is_refused_on_all(rank, ranks):
    ddp, _ = hooked(net(), 0.1 + 0.1 * (rank == 0))
    with pytest.raises(ValueError, match="must be the same on all ranks; here they are"):
        backward(ddp, batch(rank, 0))
    other = DistributedDataParallel(net())
    other.register_comm_hook(gp.TopK(net(), 0.1), gp.TopK.hook)
    with pytest.raises(ValueError, match="make it from the model that DDP was given"):
        backward(other, batch(rank, 0))
    embedding = DistributedDataParallel(nn.Embedding(5, 2, sparse=True))
    embedding.register_comm_hook(gp.TopK(embedding, 0.5), gp.TopK.hook)
    with pytest.raises(TypeError, match="make the embedding dense"):
        embedding(torch.tensor([1])).sum().backward()


CASES = (
    at_density_1_it_is_an_all_reduce,
    it_is_what_one_process_computes,
    what_is_sent_and_what_waits_is_what_came_in,
    no_dtype_that_is_not_shorter_is_sent,
    every_byte_is_counted,
    a_run_resumes_bit_for_bit,
    what_two_ranks_saved_is_loaded_on_any_number,
    pruned_weights_take_no_part,
    a_gradient_that_is_not_finite_on_one_rank_is_nan_on_all,
    what_waits_for_a_parameter_that_no_rank_used_goes_on_waiting,
    what_ranks_do_not_agree_on_is_refused_on_all,
)

found, test_over_several_processes = group.tested(CASES)


LINEAR = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, "density must be", {"density": 0.0}),
        (ValueError, "density must be", {"density": 1.5}),
        (TypeError, "density must be a number", {"density": "0.1"}),
        (TypeError, "density must be a number or a function", {"density": LINEAR}),
        (ValueError, "momentum must be", {"momentum": 1.0}),
        (ValueError, "dtype must be one of", {"dtype": torch.float32}),
        (TypeError, "group must be a process group", {"group": 2}),
        (ValueError, "no parameter in params is trained", {"params": nn.Linear(1, 1).requires_grad_(False)}),
        (ValueError, "is complex", {"params": nn.Linear(1, 1, dtype=torch.complex64)}),
        (TypeError, "is lazy", {"params": nn.LazyLinear(2)}),
    ],
)
def test_a_wrong_argument_is_refused(error, match, options):
    with pytest.raises(error, match=match):
        gp.TopK(**{"params": LINEAR, "density": 0.1} | options)


def of(momentum=0.0, **changes):
    """A state of one rank, changed."""
    state = gp.TopK(LINEAR, 0.1, momentum=momentum).state_dict()
    state["rank 0"]["residuals"] |= changes
    return state


@pytest.mark.parametrize(
    ("match", "state"),
    [
        ("lacks 'ranks'", {"steps": 1}),
        ("steps must be", of() | {"steps": -1}),
        ("lacks the part of rank 1", of() | {"ranks": 2}),
        ("has velocities", of(momentum=0.5)),
        ("'other' is not in both", of(other=torch.zeros(1))),
        (r"residuals of 'bias' are \(3,\), not \(2,\)", of(bias=torch.zeros(3))),
        ("residuals of 'bias' are list", of(bias=[1.0, 2.0])),
        ("are not finite", of(bias=torch.tensor([0.0, torch.nan]))),
    ],
)
def test_a_wrong_state_is_refused_and_changes_nothing(match, state):
    topk = gp.TopK(LINEAR, 0.1)
    topk.load_state_dict(of(weight=torch.ones(2, 2)) | {"steps": 3})
    with pytest.raises(ValueError, match=match):
        topk.load_state_dict(state)
    assert topk.steps == 3
    assert torch.equal(topk.residuals["weight"], torch.ones(2, 2))
    with pytest.raises(ValueError, match="lacks 'velocities'"):
        gp.TopK(LINEAR, 0.1, momentum=0.5).load_state_dict(of())
