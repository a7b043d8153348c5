"""Scores of a loss are true, keep their order, and refuse what has none, whatever the model and the batches are."""

import copy
import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils import checkpoint

import gradprune as gp

SQUARES = nn.functional.mse_loss
X, Y = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0)).unbind()
OF_LOSS = {name: getattr(gp, name) for name in ("gradient", "taylor", "snip", "grasp", "fisher", "movement")}
every_score_of_a_loss = pytest.mark.parametrize("score", OF_LOSS.values(), ids=OF_LOSS)


class Checkpointed(nn.Module):
    """Its first layer, or one in the middle, inside a reentrant checkpoint, or not."""

    def __init__(self, function, middle):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.function, self.middle = function, middle

    def forward(self, x):
        return self.head(self.function(lambda z: torch.tanh(self.body(z)), self.first(x) if self.middle else x))


class OldCheckpointFunction(torch.autograd.Function):
    """As other libraries have it, without torch's own checks."""

    @staticmethod
    def forward(ctx, run, x):
        ctx.run = run
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            ctx.run(x).backward(grad)
        return None, x.grad


@every_score_of_a_loss
@pytest.mark.parametrize("middle", [False, True])
def test_weights_in_a_reentrant_checkpoint_get_their_true_score(score, middle):
    reentrant = partial(checkpoint.checkpoint, use_reentrant=True)
    batches = [(X.clone().requires_grad_(), Y)]
    wanted = score(Checkpointed(lambda run, x: run(x), middle), batches, SQUARES)
    model = Checkpointed(reentrant, middle)
    found = score(model, batches, SQUARES)
    assert bool(found["body.weight"].any())
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name])
    assert "apply" not in vars(checkpoint.CheckpointFunction)
    assert all(p.grad is None for p in model.parameters())
    assert batches[0][0].grad is None


@every_score_of_a_loss
def test_a_checkpoint_that_hides_its_gradients_is_refused(score):
    model = Checkpointed(OldCheckpointFunction.apply, middle=False)
    with pytest.raises(ValueError, match="hides that part's gradients"):
        score(model, [(X.clone().requires_grad_(), Y)], SQUARES)


@every_score_of_a_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_small_gradients_keep_the_order_that_float64_gives(score, dtype):
    torch.manual_seed(0)
    layer, small = nn.Linear(10, 20).to(dtype), 1e-3 if dtype == torch.float16 else 1e-18
    x = torch.randn(5, 10).to(dtype)

    def loss(outputs, _):
        return outputs.to(torch.promote_types(dtype, torch.float32)).square().mean() * small

    found = score(layer, [(x, None)], loss)["weight"]
    wanted = score(copy.deepcopy(layer).double(), [(x.double(), None)], loss)["weight"]
    assert bool((found != 0).all())
    assert found.dtype in (torch.float32, torch.float64)
    tolerance = {torch.float16: 3e-2, torch.bfloat16: 2e-1, torch.float32: 1e-3}[dtype]
    assert float((found / wanted - 1).abs().median()) < tolerance


@every_score_of_a_loss
def test_gradients_of_any_size_in_float32_are_scored_as_in_float64(score):
    layer, x = nn.Linear(3, 2, bias=False), torch.tensor([[1.0, 2.0, 3.0]])
    for size in (1e-35, 1e-25, 1e18):

        def loss(outputs, _, size=size):
            return outputs.square().sum() * size

        found = score(layer, [(x, None)], loss)["weight"]
        wanted = score(copy.deepcopy(layer).double(), [(x.double(), None)], loss)["weight"]
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=0)


def test_products_beyond_float64_are_refused_rather_than_all_equal():
    layer, x = nn.Linear(2, 1, bias=False).double(), torch.ones(1, 2).double()
    with torch.no_grad():
        layer.weight.fill_(1e-200)
    with pytest.raises(ValueError, match="the score of 'weight' is too small for float64"):
        gp.taylor(layer, [(x, None)], lambda outputs, _: outputs.sum() * 1e-200)
    deep = nn.Sequential(*[nn.Linear(100, 100) for _ in range(500)])
    with pytest.raises(ValueError, match="too large for float64"):
        gp.synflow(deep, torch.ones(1, 100))


def test_scores_of_two_precisions_are_ranked_together_exactly():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight.mul_(1e-25)
    score = partial(gp.fisher, batches=[(X, Y[:, :3])], loss=SQUARES)
    assert score(model)["0.weight"].dtype == torch.float64
    masks = gp.prune(model, score, sparsity=0.25)
    assert int((~masks["0.weight"]).sum()) == 14


@every_score_of_a_loss
def test_a_gradient_or_a_loss_that_is_not_finite_is_refused(score):
    layer = nn.Linear(4, 4)
    for factor in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"the loss is (nan|inf)"):
            score(layer, [(X, Y)], lambda out, y, f=factor: out.square().sum() * f)

    def steep(out, _):
        return (out - out.detach()).abs().sqrt().sum()  # 0, with an infinite slope

    with pytest.raises(ValueError, match="contains NaN or infinities"):
        score(layer, [(X, Y)], steep)


@every_score_of_a_loss
def test_batches_that_are_no_pairs_are_refused(score):
    layer = nn.Linear(4, 4)
    for batches, told in (
        ([X], r"batch 0 must be a pair \(inputs, targets\), got a tensor of shape \(8, 4\)"),
        ((X, Y), r"if it is one pair, \[\(inputs, targets\)\]"),
        (X, "batches must be an iterable of pairs"),
        ([{"input": X}], "of dicts make pairs"),
        ({"input": X}, "got a dict"),
        ("batches", "got 'batches'"),
        (3, "got 3"),
        ([(X, Y, Y)], "got a tuple of 3"),
        ([torch.randn(2, 4)], "must be a pair"),
    ):
        with pytest.raises(TypeError, match=told):
            score(layer, batches, SQUARES)


@every_score_of_a_loss
def test_losses_that_are_none_are_refused(score):
    layer = nn.Linear(4, 4)
    for loss, kind, told in (
        (3, TypeError, r"loss must be a function, got 3; it is called as loss\(outputs, targets\)"),
        (nn.MSELoss, TypeError, r"got the class MSELoss: make one, MSELoss"),
        (lambda out, y: 1.0, TypeError, "loss must return a scalar tensor, got float"),
        (lambda out, y: out.detach().sum(), ValueError, "does not depend on the trainable parameters"),
        (lambda out, y: out.square(), ValueError, "loss must return a scalar, got shape"),
        (lambda out, y: out.sum() * 1j, ValueError, "loss must be real"),
    ):
        with pytest.raises(kind, match=told):
            score(layer, [(X, Y)], loss)


@every_score_of_a_loss
def test_batches_without_samples_are_refused(score):
    with pytest.raises(ValueError, match=r"held no sample|the loss is nan"):
        score(nn.Linear(4, 4), [(X[:0], Y[:0])], SQUARES)


def test_a_loss_without_batches_is_refused_and_a_frozen_model_has_no_gradient():
    with pytest.raises(ValueError, match="a loss needs batches"):
        gp.taylor(nn.Linear(2, 2), loss=SQUARES)
    with pytest.raises(ValueError, match="no parameter of the model is trainable"):
        gp.taylor(nn.Linear(4, 4).requires_grad_(False), [(X, Y)], SQUARES)


class Prompted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, prompt, x):
        return self.layer(x)


def test_fisher_passes_what_is_no_tensor_to_every_sample():
    model = Prompted()
    found = gp.fisher(model, [(("prompt", X), Y)], SQUARES)
    wanted = gp.fisher(model.layer, [(X, Y)], SQUARES)
    assert torch.equal(found["layer.weight"], wanted["weight"])
    with pytest.raises(TypeError, match="batches must hold tensors"):
        gp.fisher(model, [(("prompt", "x"), "y")], SQUARES)
    with pytest.raises(ValueError, match=r"as many rows as samples, got \[3, 8\] rows"):
        gp.fisher(model, [(("prompt", X), Y[:3])], SQUARES)


@dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor


class Returning(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.wrap = nn.Linear(4, 3), wrap

    def forward(self, x):
        return self.wrap(self.layer(x))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: ("label", y),
        lambda y: {"names": ["a", "b"], "logits": y},
        lambda y: [torch.arange(3), (y,)],
        lambda y: Output(y.mean(), y),
        lambda y: y.sum(),
    ],
)
def test_synflow_takes_the_first_floating_tensor_of_whatever_is_returned(wrap):
    wanted = gp.synflow(Returning(lambda y: y), X)
    assert torch.equal(gp.synflow(Returning(wrap), X)["layer.weight"], wanted["layer.weight"])


def test_synflow_refuses_outputs_without_a_flow():
    with pytest.raises(TypeError, match="must return a floating tensor"):
        gp.synflow(Returning(lambda y: "text"), X)
    with pytest.raises(ValueError, match="does not depend on the trainable parameters"):
        gp.synflow(Returning(lambda y: y.detach()), X)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    model[1].requires_grad_(False)
    with pytest.raises(ValueError, match="no flow reaches the output"):
        gp.synflow(model, X)


@pytest.mark.parametrize("name", [*OF_LOSS, "synflow"])
def test_scripted_models_are_scored_or_refused(name):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 4))
    scripted = torch.jit.trace(model, X)
    arguments = (X,) if name == "synflow" else ([(X, Y)], SQUARES)
    score = getattr(gp, name)
    if name in ("synflow", "movement"):
        with pytest.raises(TypeError, match=f"{name} runs the model with other weights, which a scripted one cannot"):
            score(scripted, *arguments)
        return
    for key, value in score(scripted, *arguments).items():
        torch.testing.assert_close(value, score(model, *arguments)[key])


@every_score_of_a_loss
def test_attention_recurrence_and_sparse_gradients_are_scored(score):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(10, 8, sparse=True)
            self.attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.recurrent = nn.LSTM(8, 4, batch_first=True)

        def forward(self, ids):
            return self.recurrent(self.attention(self.words(ids)))[0]

    scores = score(Words(), [(torch.arange(6).view(2, 3), torch.zeros(2, 3, 4))], SQUARES)
    for name, value in scores.items():
        assert value.layout == torch.strided
        assert bool(value.any()) or "bias" in name, name  # some biases start at zero, where w g is zero


def test_stored_sparse_gradients_are_scored():
    words = nn.Embedding(4, 2, sparse=True)
    words(torch.tensor([1, 1])).sum().backward()
    assert gp.gradient(words)["weight"].tolist() == [[0, 0], [2, 2], [0, 0], [0, 0]]


@every_score_of_a_loss
def test_inference_mode_autocast_and_torchs_defaults_do_not_matter(score):
    layer = nn.Linear(4, 4)
    wanted = score(layer, [(X, Y)], SQUARES)["weight"]
    with torch.inference_mode():
        assert torch.equal(score(layer, [(X.clone(), Y)], SQUARES)["weight"], wanted)
    with torch.autocast("cpu"):
        torch.testing.assert_close(score(layer, [(X, Y)], SQUARES)["weight"], wanted, rtol=0.1, atol=0.02)
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = score(layer, [(X, Y)], SQUARES)["weight"]
        chance = gp.random(layer)["weight"]
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, wanted)
    assert (chance.dtype, chance.device.type) == (torch.float32, "cpu")


def test_what_is_no_model_or_cannot_be_read_is_refused_by_name():
    for score in (gp.magnitude, gp.random, gp.rotation, gp.gradient, partial(gp.activation, batches=[X])):
        for model, told in (
            (None, "model must be a torch.nn.Module, got None"),
            (nn.Linear, "got the class Linear"),
            (nn.Linear(2, 2).state_dict(), "looks like a state dict"),
            (nn.Sequential(nn.Linear(2, 2, device="meta")), r"'0\.weight' is on the meta device"),
            (nn.Sequential(nn.LazyLinear(2)), r"'0\.weight' is lazy"),
        ):
            with pytest.raises(TypeError, match=told):
                score(model)


def test_numbers_and_generators_are_checked():
    layer = nn.Linear(4, 4)
    for lr in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="lr must be a finite number, at least 0"):
            gp.movement(layer, [(X, Y)], SQUARES, lr=lr)
    for wrong in ("0.1", None, True):
        with pytest.raises(TypeError, match="lr must be a number"):
            gp.movement(layer, [(X, Y)], SQUARES, lr=wrong)
        with pytest.raises(TypeError, match="period must be a number"):
            gp.rotation(layer, wrong)
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator or None, got int"):
        gp.random(layer, 3)


def test_sparse_and_eight_bit_weights_are_sized_and_frozen_unreadable_ones_left_out():
    held = nn.ParameterDict(
        {
            "sparse": nn.Parameter(torch.eye(2).to_sparse(), requires_grad=False),
            "eight": nn.Parameter((-torch.eye(2)).to(torch.float8_e4m3fn), requires_grad=False),
            "away": nn.Parameter(torch.empty(2, 2, device="meta"), requires_grad=False),
        }
    )
    scores = gp.magnitude(held)
    assert set(scores) == {"sparse", "eight"}
    assert all(torch.equal(score, torch.eye(2)) for score in scores.values())


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no product in groups")
@pytest.mark.parametrize("offsets", [[2, 5], [2, 8], [0, 8]])
def test_the_flow_through_experts_is_that_of_their_products_one_by_one(offsets):
    class Experts(nn.Module):
        def __init__(self, grouped):
            super().__init__()
            self.grouped, self.weight = grouped, nn.Parameter(torch.linspace(-1, 1, 2 * 4 * 8).view(2, 4, 8))

        def forward(self, x):
            if self.grouped:
                return torch._grouped_mm(x, self.weight, offs=torch.tensor(offsets, dtype=torch.int32))
            ends = [0, *offsets]
            return torch.cat([x[ends[at] : ends[at + 1]] @ w for at, w in enumerate(self.weight)])

    example = torch.ones(8, 4)
    found, wanted = (gp.synflow(Experts(grouped), example)["weight"] for grouped in (True, False))
    torch.testing.assert_close(found, wanted)


def test_reentrant_checkpoints_are_left_as_they_were_found(monkeypatch):
    """Also where somebody has put another way to run them in torch's place."""
    kind = torch.utils.checkpoint.CheckpointFunction
    monkeypatch.setattr(kind, "apply", mine := staticmethod(lambda *_: None), raising=False)
    gp.gradient(nn.Linear(2, 1), [(torch.ones(1, 2), None)], lambda outputs, _: outputs.sum())
    assert vars(kind)["apply"] is mine


def test_what_stands_for_a_pair_is_said_with_what_was_meant():
    x, model = torch.ones(2, 3), nn.Linear(3, 1)
    for batches, told in [
        ([x], r"batch 0 must be a pair \(inputs, targets\), got a tensor of shape \(2, 3\)$"),
        ([(x, None), x, x], r"batch 1 must be a pair .*, got a tensor of shape \(2, 3\)$"),
        ((x, x), r"got a tensor of shape .*, and batches, if it is one pair, \[\(inputs, targets\)\]$"),
        ([{"x": x}], r"got a dict; of dicts make pairs: \[\(d, d\['labels'\]\) for d in loader\]$"),
        ([(x, x, x)], r"got a tuple of 3$"),
        (["text"], r"got 'text'$"),
    ]:
        with pytest.raises(TypeError, match=told):
            gp.taylor(model, batches, lambda outputs, _: outputs.sum())
