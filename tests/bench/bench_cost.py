"""What pruning saves and what it costs: one prediction masked and with units removed; each score beside an epoch."""

import copy

import torch
from bench_score import network
from record import in_turn, parser, ratios, settle, summary, write
from torch import nn
from torch.profiler import ProfilerActivity, profile

import gradprune as gp

SPARSITY = 0.9


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024))


def without_masked_units(model, masks):
    """The same function with the hidden units that lost their inputs taken out, their constant outputs moved on."""
    first, _, second = model
    stays = masks["0.weight"].any(dim=1)
    with torch.no_grad():
        small = nn.Sequential(nn.Linear(1024, int(stays.sum())), nn.ReLU(), nn.Linear(int(stays.sum()), 1024))
        small[0].weight.copy_(first.weight[stays])
        small[0].bias.copy_(first.bias[stays])
        small[2].weight.copy_(second.weight[:, stays])
        small[2].bias.copy_(second.bias + second.weight[:, ~stays] @ first.bias[~stays].relu())
    return small


class Compressed(nn.Module):
    """Linear layers whose weights are stored and multiplied in CSR."""

    def __init__(self, model):
        super().__init__()
        self.layers = [(layer.weight.detach().to_sparse_csr(), layer.bias.detach()) for layer in (model[0], model[2])]

    def forward(self, x):
        (w1, b1), (w2, b2) = self.layers
        return ((w2 @ ((w1 @ x.T).T + b1).relu().T).T) + b2


def predictions(batch):
    dense = two_layers()
    single, units = copy.deepcopy(dense), copy.deepcopy(dense)
    gp.prune(single, sparsity=SPARSITY)
    masks = gp.prune(units, sparsity=SPARSITY, granularity="channel", include="0.weight")
    removed = without_masked_units(units, masks)
    x = torch.randn(batch, 1024)
    with torch.no_grad():
        assert torch.allclose(units(x), removed(x), atol=1e-4)
        assert torch.allclose(single(x), Compressed(single)(x), atol=1e-4)
    sides = {
        "dense": dense,
        "90 % of the weights masked": single,
        "90 % of the hidden units masked": units,
        "the masked units removed": removed,
        "the masked weights left out (CSR)": Compressed(single),
    }

    def call(model):
        with torch.no_grad():
            model(x)

    return {name: lambda model=model: [call(model) for _ in range(10)] for name, model in sides.items()}


def scores(samples):
    model, loss = network(), nn.functional.cross_entropy
    x, y = torch.randn(samples, 1, 28, 28), torch.randint(0, 10, (samples,))
    batches = list(zip(x.split(64), y.split(64), strict=True))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def epoch():
        for inputs, targets in batches:
            optimizer.zero_grad()
            loss(model(inputs), targets).backward()
            optimizer.step()

    return {
        "epoch of training": epoch,
        "magnitude": lambda: gp.magnitude(model),
        "random": lambda: gp.random(model),
        "gradient": lambda: gp.gradient(model, batches, loss),
        "taylor": lambda: gp.taylor(model, batches, loss),
        "snip": lambda: gp.snip(model, batches, loss),
        "grasp": lambda: gp.grasp(model, batches, loss),
        "synflow": lambda: gp.synflow(model, x[:1]),
        "fisher": lambda: gp.fisher(model, batches, loss),
        "activation": lambda: gp.activation(model, batches),
        "movement": lambda: gp.movement(model, batches, loss),
    }, sum(p.nbytes for p in model.parameters())


def most_allocated(run):
    """The most bytes of tensors held at once beyond what was there; resident memory would not show what is reused."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--samples", type=int, default=1024, help="examples of an epoch")
    arguments = options.parse_args()
    settle(arguments)
    torch.manual_seed(0)
    rows = []
    for batch in (1, 64):
        sides = predictions(batch)
        in_turn(sides, 2)
        seconds = in_turn(sides, arguments.rounds)
        rows += [
            {
                "task": f"prediction, batch {batch}",
                "side": name,
                **summary(taken),
                "ratio": ratios(taken, seconds["dense"]),
            }
            for name, taken in seconds.items()
        ]
    sides, model_bytes = scores(128)
    in_turn(sides, 1)
    extra = {}
    for name, run in sides.items():
        extra[name] = most_allocated(run) / model_bytes
    sides, _ = scores(arguments.samples)
    rounds = max(3, arguments.rounds // 3)
    seconds = in_turn(sides, rounds)
    rows += [
        {
            "task": "score",
            "side": name,
            **summary(taken),
            "ratio": ratios(taken, seconds["epoch of training"]),
            "extra memory / model": extra[name],
        }
        for name, taken in seconds.items()
    ]
    write("bench_cost", rows, seeds=[0], samples=arguments.samples, batch=64, sparsity=SPARSITY)
