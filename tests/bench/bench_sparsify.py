"""Thresholding a hundred million gradients beside torch.topk and beside a mask that is multiplied in."""

import torch
from record import PeakMemory, in_turn, parser, ratios, settle, summary, write

import gradprune as gp

DENSITY, THRESHOLD, RATIO = 0.01, 0.5, 1.0


class Gradients:
    """Eight parameters whose gradients are drawn once and put back before every run."""

    def __init__(self, entries):
        torch.manual_seed(0)
        self.given = torch.randn(entries).split(entries // 8)
        self.parameters = [torch.nn.Parameter(torch.empty_like(g)) for g in self.given]
        for parameter, gradient in zip(self.parameters, self.given, strict=True):
            parameter.grad = gradient.clone()

    @torch.no_grad()
    def restore(self):
        for parameter, gradient in zip(self.parameters, self.given, strict=True):
            parameter.grad.copy_(gradient)

    @property
    def grads(self):
        return [p.grad for p in self.parameters]

    @property
    def bytes(self):
        return sum(g.nbytes for g in self.given)

    def kept(self):
        return sum(int(torch.count_nonzero(g)) for g in self.grads)


def multiply_by_threshold(gradients):
    for g in gradients.grads:
        g.mul_(g.abs() >= THRESHOLD)


def multiply_by_ratio(gradients):
    for g in gradients.grads:
        size = g.abs()
        g.mul_(size >= RATIO * size.mean())


def top_by_indices(gradients):
    """As it is usually written: join, topk, scatter into zeros, split."""
    joined = torch.cat([g.view(-1) for g in gradients.grads])
    best = joined.abs().topk(round(DENSITY * joined.numel()), sorted=False).indices
    sent = torch.zeros_like(joined).scatter_(0, best, joined[best])
    sizes = [g.numel() for g in gradients.grads]
    for g, part in zip(gradients.grads, sent.split(sizes), strict=True):
        g.copy_(part.view_as(g))


def top_by_mask(gradients):
    """The k-th largest as a threshold: a mask is multiplied in; what ties with it stays too."""
    joined = torch.cat([g.abs().view(-1) for g in gradients.grads])
    cut = joined.topk(round(DENSITY * joined.numel()), sorted=False).values.min()
    for g in gradients.grads:
        g.mul_(g.abs() >= cut)


def tasks(gradients):
    parameters = gradients.parameters
    feedback = gp.ErrorFeedback(parameters, DENSITY)
    corrected = gp.ErrorFeedback(parameters, DENSITY, momentum=0.9)
    return {
        f"|g| < {THRESHOLD}": {
            "gradprune.threshold_gradients_": lambda: gp.threshold_gradients_(parameters, THRESHOLD),
            "mask multiplied in": lambda: multiply_by_threshold(gradients),
        },
        f"|g| < {RATIO} times the mean of its tensor": {
            "gradprune.threshold_gradients_": lambda: gp.threshold_gradients_(parameters, ratio=RATIO),
            "mask multiplied in": lambda: multiply_by_ratio(gradients),
        },
        f"top {DENSITY:.0%} of all": {
            "gradprune.keep_top_gradients_": lambda: gp.keep_top_gradients_(parameters, DENSITY),
            "torch.topk, scattered": lambda: top_by_indices(gradients),
            "torch.topk, mask multiplied in": lambda: top_by_mask(gradients),
            "gradprune.ErrorFeedback.step": feedback.step,
            "gradprune.ErrorFeedback.step, momentum": corrected.step,
        },
    }


def compare(entries, rounds):
    gradients = Gradients(entries)
    rows = []
    for task, sides in tasks(gradients).items():
        memory, kept = {}, {}
        for name, run in sides.items():
            gradients.restore()
            with PeakMemory() as peak:
                run()
            memory[name], kept[name] = peak.extra / gradients.bytes, gradients.kept()
        seconds = in_turn(sides, rounds, before=gradients.restore)
        ours = seconds[next(iter(sides))]
        rows += [
            {"entries": f"{entries:,}", "task": task, "side": name, **summary(seconds[name]),
             "times as long as ours": ratios(seconds[name], ours), "extra memory / gradients": memory[name],
             "kept": kept[name]}
            for name in sides
        ]  # fmt: skip
    return rows


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--millions", type=int, default=100)
    options.add_argument("--rounds", type=int, default=5)
    arguments = options.parse_args()
    settle(arguments)
    rows = compare(arguments.millions * 10**6, arguments.rounds)
    write("bench_sparsify", rows, seeds=[0], density=DENSITY, threshold=THRESHOLD, ratio=RATIO)
