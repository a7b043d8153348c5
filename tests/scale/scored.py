"""Networks and batches by which scores that run a model are compared with those of one process."""

import torch
from shards import local, part
from torch import nn

import gradprune as gp

LOSS = nn.functional.mse_loss
SCORES = {
    "fisher": lambda model, batches: gp.fisher(model, batches, LOSS),
    "grasp": lambda model, batches: gp.grasp(model, batches, LOSS),
    "movement": lambda model, batches: gp.movement(model, batches, LOSS, lr=0.1),
    "synflow": lambda model, _: gp.synflow(model, torch.empty(3, 4)),
    "activation": lambda model, batches: gp.activation(model, batches),
}


def network(hidden=7, dtype=torch.float32):
    """Four layers, of which the first is called twice, and nothing divides evenly."""
    torch.manual_seed(0)
    twice = nn.Linear(4, 4)
    rest = nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 5, bias=False)
    return nn.Sequential(twice, nn.GELU(), twice, *rest).to(dtype)


def batches(of, number=2, rows=3, dtype=torch.float32):
    made = torch.Generator().manual_seed(of)
    return [
        (torch.randn(rows, 4, generator=made).to(dtype), torch.randn(rows, 5, generator=made).to(dtype))
        for _ in range(number)
    ]


def check_as_one_process(name, model, alone, at, shares):
    """Scores, and masks, of a model on the batches of `at`, and of one process on those of all shares."""
    dtype = next(alone.parameters()).dtype
    every = [batches(share, dtype=dtype) for share in range(shares)]
    whole = [batch for share in every for batch in share]
    if name == "movement":  # a step is by the batches of all ranks
        whole = [tuple(torch.cat(parts) for parts in zip(*step, strict=True)) for step in zip(*every, strict=True)]
    mine, score = batches(at, dtype=dtype), SCORES[name]
    before = [local(p).clone() for p in model.parameters()]
    wanted, found = score(alone, whole), score(model, mine)
    assert list(found) == list(wanted)
    near = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    for key, one in wanted.items():
        assert getattr(found[key], "placements", None) == getattr(model.get_parameter(key), "placements", None)
        held, other = local(found[key]), part(one, found[key])
        assert held.dtype == other.dtype
        torch.testing.assert_close(held, other, rtol=near, atol=near * float(one.abs().max()), msg=f"{name} of {key}")
    assert all(torch.equal(local(p), old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())
    masks = [gp.prune(m, lambda m, b=b: score(m, b), sparsity=0.5) for m, b in ((alone, whole), (model, mine))]
    for key, mask in masks[1].items():
        assert torch.equal(local(mask), part(masks[0][key], mask)), (name, key)


class Whole:
    """Notes how many entries of parameters that were put together are in memory at once."""

    def __enter__(self):
        from gradprune.core import blockwise

        self.most, self._alive, self._cut, self._together = 0, [], blockwise.Cut, blockwise.Cut.together
        blockwise.Cut.together = lambda cut, block: self._noted(self._together(cut, block))
        return self

    def __exit__(self, *_):
        self._cut.together = self._together

    def _noted(self, whole):
        from torch.multiprocessing.reductions import StorageWeakRef

        self._alive = [(ref, size) for ref, size in self._alive if not ref.expired()]
        self._alive.append((StorageWeakRef(whole.untyped_storage()), whole.numel()))
        self.most = max(self.most, sum(size for _, size in self._alive))
        return whole
