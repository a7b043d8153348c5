"""gp.prune on DTensors: the masks of one process, over several."""

import itertools
import tempfile
from unittest import mock

import group
import pytest
import torch
import torch.distributed as dist
from shards import LAYOUTS, bits, cases_for, chain, in_quiet, local, mesh_of, part, sharded, whole
from torch import nn

import gradprune as gp
from gradprune.core import select_sharded
from gradprune.core.collect import Values

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
VALUES = ("normal", "ties", "zeros", "equal", "extremes")


def check_as_one_process(mesh, how, case, **asked):
    alone, spread = chain(*case), sharded(chain(*case), how, mesh)
    wanted, found = in_quiet(gp.prune, alone, **asked), in_quiet(gp.prune, spread, **asked)
    assert list(found) == list(wanted), (how, case, asked)
    for name, mask in found.items():
        parameter = spread.get_parameter(name)
        assert type(mask) is type(parameter.data)
        assert torch.equal(local(mask), part(wanted[name], mask)), (how, case, asked, name)
        before = part(alone.get_parameter(name), parameter).clone()
        assert torch.equal(bits(local(parameter)), bits(before)), (how, case, asked, name)
        assert getattr(mask, "placements", None) == getattr(parameter, "placements", None)
    assert found.sparsity == wanted.sparsity
    assert found.holds(spread)


def masks_are_those_of_one_process(rank, ranks):
    mesh = mesh_of(ranks)
    for seed, (how, values) in cases_for(enumerate(itertools.product(LAYOUTS, VALUES)), ranks):
        dtype, other = DTYPES[seed % 4], DTYPES[(seed + 1 + seed // 4) % 4]
        check_as_one_process(mesh, how, (seed, (5, 7, 8, 3), dtype, values), sparsity=0.6)
        check_as_one_process(mesh, how, (seed, (7, 5, 1, 2, 16), other, values), sparsity=0.37, scope="layer")
        check_as_one_process(mesh, how, (seed, (7, 5, 8, 2, 16), dtype, values), sparsity=0.6, scope="lamp")
    for sparsity, scope in itertools.product((0.0, 1.0, 0.97), ("global", "lamp")):
        check_as_one_process(mesh, "fsdp", (1, (5, 7, 4), torch.float32, "ties"), sparsity=sparsity, scope=scope)
    check_as_one_process(mesh, "rows", (1, (9, 7, 4)), sparsity=0.5, scope={"0.weight": 0.2}, exclude="1.*")
    check_as_one_process(mesh, "columns", (1, (9, 7, 4)), sparsity=0.9, min_keep=4)
    thresholds = ("normal", 0.7), ("ties", 0.5), ("extremes", 0.0), ("zeros", 0.1)
    for how, (values, threshold) in cases_for(itertools.product(LAYOUTS, thresholds), ranks):
        check_as_one_process(mesh, how, (4, (5, 7, 8, 3), DTYPES[len(how) % 4], values), threshold=threshold)
    check_as_one_process(mesh, "mixed", (4, (5, 7, 8, 3)), threshold=5.0, min_keep=3, scope="layer")


def larger_masks_are_those_of_one_process_whatever_a_sample_says(rank, ranks):
    mesh, brackets = mesh_of(ranks), select_sharded._brackets
    for seed, values in cases_for(enumerate(VALUES), ranks):
        for how, dtype in zip(("fsdp", "columns", "mixed"), DTYPES[seed % 2 :], strict=False):
            sparsity = (0.333, 0.5, 0.87, 0.999)[seed % 4]
            for scope in ("global", "lamp"):
                check_as_one_process(mesh, how, (seed, (401, 300, 257), dtype, values), sparsity=sparsity, scope=scope)
    size = 31 * 40 + 40 * 9
    rank_of_cut = size - round(0.3 * size) + 1
    weights = torch.cat([p.detach().abs().view(-1) for p in chain(7, (31, 40, 9)).parameters()])
    cut = int(weights.sort().values[rank_of_cut - 1].view(torch.int32))
    for missed in ((0, 0), (5, 2**20), (cut, cut), (cut + 1, cut + 2**16), (0, cut - 1), (2**31 - 9, 2**31 - 1)):
        select_sharded._brackets = lambda groups, _, missed=missed: [missed] * len(groups)
        for scope in ("global", "layer"):
            check_as_one_process(mesh, "rows", (7, (31, 40, 9), torch.float32, "normal"), sparsity=0.7, scope=scope)
    select_sharded._brackets = brackets


def an_accelerators_way_to_choose_gives_the_same_masks(rank, ranks):
    mesh = mesh_of(ranks)
    with mock.patch.object(Values, "on_cpu", False), mock.patch.object(select_sharded, "PIECE", 500):
        for seed, (how, values) in cases_for(enumerate(itertools.product(LAYOUTS, VALUES)), ranks):
            for sizes, scope in (((401, 30, 25), "global"), ((40, 90, 25), "layer")):
                case = (seed, sizes, DTYPES[seed % 4], values)
                check_as_one_process(mesh, how, case, sparsity=0.6, scope=scope)
        theirs = sent_for(mesh, [150, 200, 120])
    assert len(theirs) == len(sent_for(mesh, [150, 200, 120]))  # the same keys were found between the same two


def layers_by_themselves_are_chosen_by_as_few_messages_as_one(rank, ranks):
    few, some, many = (sent_for(mesh_of(ranks), [16] * number) for number in (3, 42, 121))
    assert len(few) < len(some) <= len(many) <= len(few) + 3  # the more, the shorter their digits
    assert sum(many) < 4e6
    large = [150, 200, 120, 250, 90]
    assert sum(sent_for(mesh_of(ranks), large)) < 4e6
    for sizes in ([16] * 121, [16] * 40, large):
        lamp = sent_for(mesh_of(ranks), sizes, scope="lamp")
        assert sum(lamp) < 4e6
        assert len(lamp) < 30


def sent_for(mesh, sizes, scope="layer"):
    """How many bytes each message of a pruning has."""
    model, sent, reduce, broadcast = sharded(chain(2, sizes), "fsdp", mesh), [], dist.all_reduce, dist.broadcast

    def noting(function):
        return lambda tensor, *args, **named: (sent.append(tensor.nbytes), function(tensor, *args, **named))[1]

    dist.all_reduce, dist.broadcast = noting(reduce), noting(broadcast)
    try:
        in_quiet(gp.prune, model, sparsity=0.7, scope=scope)
    finally:
        dist.all_reduce, dist.broadcast = reduce, broadcast
    return sent


def check_refused(rank, ranks, model, kind, match, **asked):
    """All ranks raise the same, and nothing is written."""
    before = [bits(local(p)).clone() for p in model.parameters()]
    with pytest.raises(kind, match=match) as raised:
        gp.prune(model, **asked)
    said = [None] * ranks
    dist.all_gather_object(said, str(raised.value))
    assert len(set(said)) == 1, said
    assert all(torch.equal(bits(local(p)), old) for p, old in zip(model.parameters(), before, strict=True))


def what_is_wrong_on_one_rank_is_raised_on_all(rank, ranks):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

    mesh, last = mesh_of(ranks), rank == ranks - 1
    model = sharded(chain(1, (5, 7, 6)), "fsdp", mesh)
    differ = f"all ranks must ask the same, but the argument sparsity is 0.5 on rank 0, 0.25 on {ranks - 1}"
    check_refused(rank, ranks, model, ValueError, differ, sparsity=0.25 if last else 0.5)
    check_refused(
        rank, ranks, model, ValueError, "the argument include is", sparsity=0.5, include="0.*" if last else "*"
    )
    check_refused(
        rank, ranks, model, ValueError, f"on rank {ranks - 1}: sparsity must be in", sparsity=1.2 if last else 0.5
    )
    check_refused(rank, ranks, model, ValueError, r"^sparsity must be in \[0, 1\]", sparsity=1.2)
    check_refused(rank, ranks, model, ValueError, "'no' matches none", sparsity=0.5, include="no")
    check_refused(
        rank, ranks, model, TypeError, f"on rank {ranks - 1}: scope must", sparsity=0.5, scope=1 if last else "layer"
    )
    unsupported = "is not supported where parameters are DTensors"
    check_refused(rank, ranks, model, ValueError, unsupported, sparsity=0.5, granularity="group")
    for how, owner in (("fsdp", 0), ("fsdp", ranks - 1), ("copies", ranks - 1)):
        model = sharded(chain(1, (5, 7, 6)), how, mesh)
        if rank == owner:
            local(model[1].weight).view(-1)[-1] = torch.nan
        check_refused(rank, ranks, model, ValueError, "'1.weight' contains NaN", sparsity=0.5)
        check_refused(rank, ranks, model, ValueError, "'1.weight' contains NaN", sparsity=1.0, scope="layer")
        check_refused(rank, ranks, model, ValueError, "'1.weight' contains NaN", threshold=0.1)
        check_refused(rank, ranks, model, ValueError, "LAMP needs .* '1.weight' has", sparsity=0.5, scope="lamp")

    model = sharded(chain(1, (5, 7, 6, 4, 3)), "mixed", mesh)
    if last:
        nn.init.normal_(model[3].weight)
    check_refused(rank, ranks, model, ValueError, "'3.weight' is no DTensor, and its values on rank", sparsity=0.5)
    assert in_quiet(gp.prune, model, sparsity=0.5, exclude="3.*").holds(model)
    weight = torch.randn(7, 5)
    model = chain(1, (5, 7))
    model[0].weight = nn.Parameter(DTensor.from_local(weight, mesh, [Partial()]))
    check_refused(rank, ranks, model, TypeError, "'0.weight' is a DTensor P.*, which is not supported", sparsity=0.5)
    flat = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("a", "b"))
    for on, place in ((flat, [Shard(0), Shard(1)]), (flat["a"], [Shard(0)]), (flat["b"], [Shard(1)])):
        alone, model = chain(1, (5, 7)), chain(1, (5, 7))
        model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), on, place))
        assert torch.equal(whole(gp.prune(model, sparsity=0.5)["0.weight"]), gp.prune(alone, sparsity=0.5)["0.weight"])


def parameters_that_a_forward_pass_left_whole_are_pruned_in_their_blocks(rank, ranks):
    from torch.distributed.fsdp import fully_shard

    alone, model = chain(5, (5, 7, 6)), fully_shard(chain(5, (5, 7, 6)), mesh=mesh_of(ranks))
    x = torch.ones(2, 5)
    with torch.no_grad():
        model(x)
        assert not hasattr(model[0].weight, "to_local")  # whole, and what is written there is lost
        wanted, masks = gp.prune(alone, sparsity=0.5), gp.prune(model, sparsity=0.5)
        assert torch.equal(model(x), alone(x))
        assert masks.holds(model)
    assert all(torch.equal(whole(masks[name]), mask) for name, mask in wanted.items())


def copies_that_differ_in_their_last_bits_get_one_mask(rank, ranks):
    from torch.distributed.tensor import DTensor, Replicate

    model, alone = (chain(3, (16, 16, 16), torch.bfloat16, "ties") for _ in range(2))
    torch.manual_seed(rank)
    with torch.no_grad():
        own = model[0].weight * (1 + torch.rand(16, 16) * (rank > 0) / 64)
    model[0].weight = nn.Parameter(DTensor.from_local(own, mesh_of(ranks), [Replicate()], run_check=False))
    wanted, found = gp.prune(alone, sparsity=0.5), gp.prune(model, sparsity=0.5)
    assert torch.equal(local(found["0.weight"]), wanted["0.weight"])
    assert torch.equal(found["1.weight"], wanted["1.weight"])


def a_transformer_keeps_its_zeros_while_it_trains(rank, ranks):
    from torch.distributed.fsdp import fully_shard
    from transformers import GPT2Config, GPT2LMHeadModel

    def transformer():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=10, vocab_size=37, n_positions=8))

    alone, model = transformer(), transformer()
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh_of(ranks))
    fully_shard(model, mesh=mesh_of(ranks))
    torch.manual_seed(rank)
    ids = torch.randint(0, 37, (2, 8))
    wanted, masks = gp.prune(alone, sparsity=0.8), gp.prune(model, sparsity=0.8)
    assert masks == {name: sharded_like(masks[name], mask) for name, mask in wanted.items()}
    assert repr(masks).startswith(f"Masks(8 tensors, 2,400 weights, sparsity {wanted.sparsity:.4f}")
    assert masks.holds(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def step():
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        masks.mask_gradients_(model)
        optimizer.step()

    step()  # with a momentum that would revive what is pruned
    for p in model.parameters():
        assert "exp_avg" in optimizer.state[p]
    with masks.hold(optimizer, model):
        for _ in range(2):
            step()
            assert masks.holds(model)
    with torch.no_grad():
        model(ids)
        for p in model.parameters():
            local(p).add_(1.0)
    assert not masks.holds(model)
    assert masks.apply_(model).holds(model)
    assert gp.prune(model, sparsity=0.9).sparsity > 0.899


def sharded_like(block, mask):
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(mask, block.device_mesh, block.placements)


def masks_go_through_a_distributed_checkpoint(rank, ranks):
    import torch.distributed.checkpoint as checkpoint

    model = sharded(chain(4, (5, 7, 6)), "fsdp", mesh_of(ranks))
    masks = gp.prune(model, sparsity=0.5)
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    checkpoint.save({"masks": masks.state_dict()}, checkpoint_id=folder[0])
    read = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    checkpoint.load({"masks": read}, checkpoint_id=folder[0])
    found = gp.Masks.from_state_dict(read)
    assert found == masks
    assert found.sparsity == masks.sparsity
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found.hold(optimizer, model)
    model(torch.randn(2, 5)).sum().backward()
    optimizer.step()
    assert found.holds(model)
    other = sharded(chain(4, (5, 7, 6)), "columns", mesh_of(ranks))
    with pytest.raises(ValueError, match=r"the mask of '0\.weight' lies as .* shard both alike"):
        found.apply_(other)


CASES = (
    masks_are_those_of_one_process,
    larger_masks_are_those_of_one_process_whatever_a_sample_says,
    an_accelerators_way_to_choose_gives_the_same_masks,
    layers_by_themselves_are_chosen_by_as_few_messages_as_one,
    what_is_wrong_on_one_rank_is_raised_on_all,
    parameters_that_a_forward_pass_left_whole_are_pruned_in_their_blocks,
    copies_that_differ_in_their_last_bits_get_one_mask,
    masks_go_through_a_distributed_checkpoint,
    a_transformer_keeps_its_zeros_while_it_trains,
)

found, test_over_several_processes = group.tested(CASES)
