"""What each score costs, as a share of one training step on the same batch."""

import torch
from record import in_turn, parser, ratios, settle, summary, write
from torch import nn

import gradprune as gp


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 49, 256), nn.ReLU(), nn.Linear(256, 10),
    )  # fmt: skip


def sides():
    model, loss = network(), nn.functional.cross_entropy
    batch = (torch.randn(64, 1, 28, 28), torch.randint(0, 10, (64,)))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def training_step():
        optimizer.zero_grad()
        loss(model(batch[0]), batch[1]).backward()
        optimizer.step()

    return {
        "training step": training_step,
        "magnitude": lambda: gp.magnitude(model),
        "random": lambda: gp.random(model),
        "gradient": lambda: gp.gradient(model, [batch], loss),
        "taylor": lambda: gp.taylor(model, [batch], loss),
        "snip": lambda: gp.snip(model, [batch], loss),
        "grasp": lambda: gp.grasp(model, [batch], loss),
        "synflow (one sample)": lambda: gp.synflow(model, batch[0][:1]),
        "fisher (64 samples one by one)": lambda: gp.fisher(model, [batch], loss),
        "activation": lambda: gp.activation(model, [batch]),
        "movement (one step)": lambda: gp.movement(model, [batch], loss, lr=1e-3),
    }


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=7)
    arguments = options.parse_args()
    settle(arguments)
    torch.manual_seed(0)
    scores = sides()
    in_turn(scores, 2)
    seconds = in_turn(scores, arguments.rounds)
    rows = [
        {"score": name, **summary(taken), "of a training step": ratios(taken, seconds["training step"])}
        for name, taken in seconds.items()
    ]
    write("bench_score", rows, seeds=[0], batch=64, network="2 convolutions, 2 linear layers, 0.82 million weights")
