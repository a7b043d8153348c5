"""What gp.prune can be asked of DTensors: scores, earlier masks, rows, n:m, blocks, channels, as in one process."""

from functools import partial

import group
import pytest
import scored
import torch
import torch.distributed as dist
from shards import bits, cases_for, chain, in_quiet, local, mesh_of, part, sharded
from torch import nn

import gradprune as gp

UNEVEN, EVEN = (5, 7, 1, 8, 3), (8, 24, 12, 24)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def spread_as(model, wholes):
    """Whole tensors by name, each spread as the model's parameter."""
    from torch.distributed.tensor import DTensor

    def one(p, whole):
        if not isinstance(p, DTensor):
            return whole
        block, mesh = part(whole, p).clone(), p.device_mesh
        return DTensor.from_local(
            block, mesh, p.placements, run_check=False, shape=whole.shape, stride=whole.contiguous().stride()
        )

    return {name: one(p, wholes[name]) for name, p in model.named_parameters()}


def check(mesh, how, sizes, score=None, *, wholes=None, within=None, **asked):
    """Prune in one process and over all; `wholes` are scores and `within` masks, by name."""
    alone, spread = chain(1, sizes), sharded(chain(1, sizes), how, mesh)
    own, others = (score, score) if score else (gp.magnitude, gp.magnitude)
    if wholes is not None:
        own, others = (lambda _: wholes), (lambda model: spread_as(model, wholes))
    inside = None if within is None else spread_as(spread, within)
    wanted = in_quiet(gp.prune, alone, own, **asked, within=within)
    found = in_quiet(gp.prune, spread, others, **asked, within=inside)
    said = how, sizes, asked
    assert found.sparsity == wanted.sparsity, said
    for name, mask in found.items():
        assert torch.equal(local(mask), part(wanted[name], mask)), (said, name)
        one, other = alone.get_parameter(name), spread.get_parameter(name)
        assert torch.equal(bits(local(other)), bits(part(one, other).clone())), (said, name)


def scores(kind, sizes, dtype=torch.float32):
    torch.manual_seed(3)
    found = {}
    for name, p in chain(1, sizes).named_parameters():
        if kind == "signed":
            found[name] = torch.randn(p.shape).to(dtype)
        elif kind == "ties":
            found[name] = (torch.randint(-3, 3, p.shape) / 2).to(dtype)
        elif kind == "ends":
            ends = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1.5])
            found[name] = ends[torch.randint(0, 6, p.shape)].to(dtype)
        elif kind == "huge":
            found[name] = torch.randn(p.shape, dtype=torch.float64) * 1e307
        else:
            found[name] = torch.randint(-(2**62), 2**62, p.shape) if kind == "long" else torch.randint(0, 9, p.shape)
    return found


def any_scores_are_ranked_as_by_one_process(rank, ranks):
    mesh = mesh_of(ranks)
    runs = [
        ("fsdp", kind, DTYPES[at % 4], {"sparsity": 0.6} | more)
        for at, (kind, more) in enumerate(
            (
                ("signed", {}),
                ("ties", {"scope": "layer"}),
                ("ends", {}),
                ("huge", {"scope": "layer"}),
                ("long", {}),
                ("counts", {"scope": "layer"}),
                ("signed", {"scope": {"1.weight": 0.9}}),
            )
        )
    ]
    runs += [
        ("columns", "ties", torch.bfloat16, {"sparsity": 0.3}),
        ("mixed", "ties", torch.float32, {"threshold": 0.5}),
    ]
    for how, kind, dtype, asked in cases_for(runs, ranks):
        check(mesh, how, UNEVEN, wholes=scores(kind, UNEVEN, dtype), **asked)
    larger = (301, 200)  # more than the sample takes
    for kind, sparsity in cases_for((("signed", 0.9), ("ties", 0.5), ("huge", 0.3)), ranks):
        check(mesh, "fsdp", larger, wholes=scores(kind, larger), sparsity=sparsity)


def what_went_before_stays_gone(rank, ranks):
    mesh = mesh_of(ranks)
    torch.manual_seed(8)
    before = {name: torch.rand(p.shape) < 0.7 for name, p in chain(1, UNEVEN).named_parameters()}
    runs = (
        ("fsdp", {"sparsity": 0.6}),
        ("columns", {"sparsity": 0.5, "scope": "layer"}),
        ("fsdp", {"threshold": 0.6}),
        ("fsdp", {"sparsity": 0.6, "wholes": scores("ties", UNEVEN)}),
        ("mixed", {"sparsity": 0.45, "min_keep": 2}),
        ("fsdp", {"sparsity": 0.8, "scope": "row"}),
        ("columns", {"sparsity": 0.6, "scope": "lamp"}),
        ("fsdp", {"sparsity": 0.7, "scope": "lamp", "wholes": scores("counts", UNEVEN), "min_keep": 2}),
    )
    for how, asked in cases_for(runs, ranks):
        check(mesh, how, UNEVEN, within=before, **asked)
    model = sharded(chain(1, UNEVEN), "fsdp", mesh)
    refused(model, "allows only", sparsity=0.1, within=spread_as(model, before))
    refused(model, "lies as whole, the parameter as", sparsity=0.9, within=before)


def rows_groups_and_blocks_are_chosen_where_shards_have_whole_ones(rank, ranks):
    mesh = mesh_of(ranks)
    runs = (
        ("fsdp", UNEVEN, {"sparsity": 0.5, "scope": "row"}),
        ("fsdp", EVEN, {"granularity": "2:4"}),
        ("fsdp", EVEN, {"sparsity": 0.55, "granularity": "2x4"}),
        ("columns", (24, 24, 24), {"sparsity": 0.6, "granularity": "1x4"}),
        ("fsdp", UNEVEN, {"sparsity": 0.5, "granularity": "channel"}),
        ("mixed", (12, 12, 12), {"sparsity": 0.4, "granularity": "2x2", "scope": "layer"}),
        ("fsdp", UNEVEN, {"sparsity": 0.5, "scope": "row", "wholes": scores("ties", UNEVEN)}),
        ("fsdp", EVEN, {"threshold": 0.8, "granularity": "1x4"}),
        ("fsdp", UNEVEN, {"sparsity": 0.5, "granularity": "channel", "scope": "lamp"}),
        ("mixed", (12, 12, 12), {"sparsity": 0.4, "granularity": "2x2", "scope": "lamp"}),
    )
    for how, sizes, asked in cases_for(runs, ranks):
        check(mesh, how, sizes, **asked)
    filters = nn.Sequential(nn.Conv2d(4, 4 * ranks, 3))  # n of m are inputs of one place in the kernel, 3 x 3
    found = in_quiet(gp.prune, sharded(filters, "fsdp", mesh), granularity="2:4")
    assert (local(found["0.weight"]).sum(1) == 2).all()
    cut = sharded(chain(1, EVEN), "columns", mesh)
    refused(cut, "rows of '0.weight' are cut by its shards", sparsity=0.5, scope="row")
    refused(cut, "channels or blocks of '0.weight' are cut", sparsity=0.5, granularity="channel")
    uneven = sharded(chain(1, (4 * ranks - 2, 4)), "columns", mesh)
    if ranks == 3:
        refused(uneven, "'0.weight' are cut", sparsity=0.5, granularity="1x5")


def mean_square(outputs, targets):
    return (outputs - targets).square().sum()


def batches(rank, number=2):
    """Small whole numbers, so that sums are exact in whatever order."""
    made = torch.Generator().manual_seed(rank)
    return [
        (
            torch.randint(-2, 3, (2, 4), generator=made).float(),
            torch.randint(-2, 3, (2, 6), generator=made).float(),
        )
        for _ in range(number)
    ]


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 6))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-3, 4, p.shape))
    return model


def data_of_all_ranks_decides_as_in_one_process(rank, ranks):
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(ranks)
    every = [batch for r in range(ranks) for batch in batches(r)]
    for score in (gp.gradient, gp.taylor, gp.snip):
        alone, model = network(), network()
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        wanted = score(alone, every, mean_square)
        found = score(model, batches(rank), mean_square)
        for name, whole in wanted.items():
            exact = ranks == 2 and score is not gp.snip  # thirds are rounded, and sums over all weights
            near = {"rtol": 0.0 if exact else 1e-6, "atol": 0.0}
            torch.testing.assert_close(local(found[name]), part(whole, found[name]), **near)
        assert all(bool((local(p.grad) == 1).all()) for p in model.parameters())
        masks = in_quiet(gp.prune, model, partial(score, batches=batches(rank), loss=mean_square), sparsity=0.5)
        assert round(masks.sparsity * 70) == 35
        assert masks.holds(model)
    uneven = batches(rank, 1 + (rank == 0))
    refused(
        model,
        "batches, by their number, is 2 on rank 0, 1 on 1",
        partial(gp.taylor, batches=uneven, loss=mean_square),
        sparsity=0.5,
    )
    wrong = (lambda *_: mean_square(*_) / (0 if rank == ranks - 1 else 1)) if ranks > 1 else mean_square
    refused(
        model,
        "the loss is",
        lambda m: gp.gradient(m, batches(rank), wrong),
        sparsity=0.5,
    )


def in_parallel(model, mesh):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(model, mesh, {"3": ColwiseParallel(), "5": RowwiseParallel()})


def scores_that_run_the_model_are_those_of_one_process(rank, ranks):
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(ranks)
    for at, name in enumerate(scored.SCORES):
        dtype = (torch.float32, torch.float64)[at % 2]
        model = scored.network(dtype=dtype)
        for layer in (model[0], model[3]) if at != 2 else ():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        scored.check_as_one_process(name, model, scored.network(dtype=dtype), rank, ranks)
        x = scored.batches(rank, dtype=dtype)[0][0]
        model(x).sum().backward()  # by FSDP2's own hooks, which are back
        assert all(p.grad is not None for p in model.parameters())
    for name in [one for one in scored.SCORES if one != "grasp"]:
        split = in_parallel(scored.network(12, torch.float64), mesh)
        scored.check_as_one_process(name, split, scored.network(12, torch.float64), 0, 1)


def scores_that_run_the_model_hold_whole_weights_a_module_at_a_time(rank, ranks):
    from torch.distributed.fsdp import fully_shard

    for name, score in scored.SCORES.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 16), *(nn.Linear(16, 16) for _ in range(9)), nn.Linear(16, 5))
        for layer in model:
            fully_shard(layer, mesh=mesh_of(ranks))
        with scored.Whole() as seen:
            score(model, scored.batches(rank, 1, 2))
        assert 0 < seen.most <= 3 * 17 * 16, (name, seen.most)


def what_is_wrong_with_a_pass_is_raised_on_all(rank, ranks):
    from torch.distributed.fsdp import fully_shard

    last, mesh = rank == ranks - 1, mesh_of(ranks)
    model, alone = (scored.network() for _ in range(2))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    mine, x = scored.batches(rank), torch.ones(2, 4)
    bad = [(torch.full((3, 4), torch.nan) if last else x, y) for x, y in mine]
    for score, match in (
        (lambda m: gp.fisher(m, scored.batches(rank, rows=2 + last), scored.LOSS), r"by their samples, is \[2, 2\] on"),
        (lambda m: gp.activation(m, scored.batches(rank, 1 + last)), "batches, by their number, is 1 on rank 0, 2 on"),
        (lambda m: gp.activation(m, bad), "what the weight of '0' multiplies contains NaN"),
        (lambda m: gp.grasp(m, bad, scored.LOSS), "the loss is nan"),
        (lambda m: gp.movement(m, mine, lambda *_: 1.0 if last else scored.LOSS(*_)), "must return a scalar tensor"),
        (lambda m: gp.synflow(m, torch.empty(2 + last, 4)), r"inputs, by their shapes,"),
        (lambda m: gp.activation(m, [torch.empty(0, 4)]), "batches held no sample"),
    ):
        kind = TypeError if "scalar tensor" in match else ValueError
        refused(model, match, score, kind, sparsity=0.5)
        torch.testing.assert_close(model(x), alone(x))
        model.reshard()
    split = in_parallel(scored.network(12), mesh)
    refused(split, "where '3.weight' is split", lambda m: scored.SCORES["grasp"](m, mine), TypeError, sparsity=0.5)
    for name in ("fisher", "activation"):
        score = scored.SCORES[name]
        refused(split, "must be given the same batches", lambda m, s=score: s(m, mine), sparsity=0.5)


def chance_is_that_of_one_process(rank, ranks):
    mesh = mesh_of(ranks)
    for how, sizes in cases_for((("fsdp", (301, 700, 3)), ("columns", (301, 700, 3)), ("mixed", UNEVEN)), ranks):
        alone, spread = chain(1, sizes), sharded(chain(1, sizes), how, mesh)
        one, other = torch.Generator().manual_seed(4), torch.Generator().manual_seed(4 + rank)
        wanted, found = gp.random(alone, one), gp.random(spread, other)
        for name, lots in found.items():
            assert torch.equal(local(lots), part(wanted[name], lots)), (how, name)
        assert torch.equal(one.get_state(), other.get_state()) == (rank == 0)
    torch.manual_seed(6)
    wanted = in_quiet(gp.prune, chain(1, UNEVEN), gp.random, sparsity=0.5)
    torch.manual_seed(6)
    found = in_quiet(gp.prune, sharded(chain(1, UNEVEN), "fsdp", mesh), gp.random, sparsity=0.5)
    assert all(torch.equal(local(mask), part(wanted[name], mask)) for name, mask in found.items())


def what_is_wrong_with_a_score_is_raised_on_all(rank, ranks):
    last, model = rank == ranks - 1, sharded(chain(1, UNEVEN), "fsdp", mesh_of(ranks))
    whole = scores("signed", UNEVEN)

    def with_nan(m):
        found = spread_as(m, whole)
        if last or ranks == 1:
            local(found["0.weight"]).view(-1)[-1:] = -torch.nan
        return found

    def broken(m):
        if last:
            raise ValueError("no data here")
        return spread_as(m, whole)

    for amount in ({"sparsity": 0.5}, {"sparsity": 0.5, "scope": "row"}, {"threshold": 0.0}):
        refused(model, "'0.weight'.* contains NaN", with_nan, **amount)
    refused(model, f"on rank {ranks - 1}: no data here", broken, sparsity=0.5)
    refused(model, "the score of '0.weight' lies as whole, the parameter as S", lambda _: whole, sparsity=0.5)
    refused(model, "must return a dict", lambda _: None, TypeError, sparsity=0.5)
    refused(
        model,
        "the score of '0.weight' is torch.float32 on rank 0, torch.float64 on",
        lambda m: {n: s.double() if last else s for n, s in spread_as(m, whole).items()},
        sparsity=0.5,
    )


def refused(model, match, score=gp.magnitude, kind=ValueError, **asked):
    before = [bits(local(p)).clone() for p in model.parameters()]
    with pytest.raises(kind, match=match) as raised:
        in_quiet(gp.prune, model, score, **asked)
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, str(raised.value))
    assert len(set(told)) == 1, told
    assert all(torch.equal(bits(local(p)), old) for p, old in zip(model.parameters(), before, strict=True))


CASES = (
    any_scores_are_ranked_as_by_one_process,
    what_went_before_stays_gone,
    rows_groups_and_blocks_are_chosen_where_shards_have_whole_ones,
    data_of_all_ranks_decides_as_in_one_process,
    scores_that_run_the_model_are_those_of_one_process,
    scores_that_run_the_model_hold_whole_weights_a_module_at_a_time,
    what_is_wrong_with_a_pass_is_raised_on_all,
    chance_is_that_of_one_process,
    what_is_wrong_with_a_score_is_raised_on_all,
)

found, test_over_several_processes = group.tested(CASES)
