"""Chapter 2's live figure: put a start on a loss with a wall, and see where gradient descent goes with a bound."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import traitlets
from torch import Tensor, nn

import gradprune as gp
from gradprune.lab import figures
from gradprune.lab.live.esm import joined
from gradprune.lab.live.figure import Live, Still

CELL: dict[str, Any] = {"steps": 20, "first": 0.5, "target": 2.0}  # h_20 of h_0 = 0.5, and what it should be
STEPS = 60  # of gradient descent
SMALL_RATE = 2e-5  # one that the wall bears without a bound
START: dict[str, Any] = {"w": 1.2, "b": -0.5, "rate": 0.05, "momentum": 0.0, "bound": 1.0, "kind": "norm"}


@dataclass(frozen=True)
class Walk:
    """Where gradient descent went: points `[n, 2]` and their losses, for each step its length and its angle.

    An angle is in degrees, to the steepest descent where the step began. A walk ends early, and is not `finite`, at a
    point where the loss or its gradient is not.
    """

    points: Tensor
    losses: Tensor
    lengths: Tensor
    angles: Tensor
    finite: bool


class Clip(Live):
    """Gradient descent on the loss of a recurrent cell in its two parameters, with a clip and without.

    `w` and `b`, the weight (0.2 to 1.4) and the bias (-1 to 1) at the start, the `rate` (1e-6 to 0.1), `momentum` (to
    0.9), the `bound` (0.1 to 64) and its `kind` (whether the "norm" is bounded, or each entry's "value") are what the
    reader sets, or a program. `path()` is where the page's walk goes, computed by gradprune.

    Example: ``lab.live.Clip(kind="value").path()``
    """

    _esm = joined("clip.js")
    w = traitlets.Float(START["w"], min=0.2, max=1.4, help="the weight at the start").tag(sync=True)
    b = traitlets.Float(START["b"], min=-1.0, max=1.0, help="the bias at the start").tag(sync=True)
    rate = traitlets.Float(START["rate"], min=1e-6, max=0.1, help="the learning rate").tag(sync=True)
    momentum = traitlets.Float(START["momentum"], min=0.0, max=0.9, help="of gradient descent").tag(sync=True)
    bound = traitlets.Float(START["bound"], min=0.1, max=64.0, help="of the clip").tag(sync=True)
    kind = traitlets.Enum(("norm", "value"), START["kind"], help="what is bounded").tag(sync=True)
    _cell = traitlets.Dict(CELL | {"walk": STEPS}).tag(sync=True)
    _start = traitlets.Dict(START).tag(sync=True)

    @staticmethod
    def loss(w: Tensor, b: Tensor) -> Tensor:
        """Return the loss of the cell h_t = w h_{t-1} + b after its steps, for tensors of one shape."""
        h = torch.full_like(w, CELL["first"])
        for _ in range(CELL["steps"]):
            h = w * h + b
        miss: Tensor = h - CELL["target"]
        return miss.square()

    def path(self, clipped: bool = True) -> Tensor:
        """Return the points of the walk with the clip, or without it, `[steps + 1, 2]`: w and b, the start first."""
        return self.walk(clipped).points

    def walk(self, clipped: bool = True) -> Walk:
        """Return the walk with the clip, or without it: its points, losses, lengths and angles."""
        at = nn.Parameter(torch.tensor([self.w, self.b], dtype=torch.float64))
        optimizer = torch.optim.SGD([at], lr=self.rate, momentum=self.momentum)
        points, losses, lengths, angles = [], [], [], []
        while True:
            optimizer.zero_grad()
            loss = self.loss(at[0], at[1])
            loss.backward()
            points.append(at.detach().clone())
            losses.append(loss.detach())
            gradient = _gradient(at).clone()
            finite = bool(loss.isfinite() and gradient.isfinite().all())
            if not finite or len(points) > STEPS:
                break
            if clipped and self.kind == "norm":
                gp.clip_by_norm_(at, self.bound)
            elif clipped:
                gp.clip_by_value_(at, self.bound)
            optimizer.step()
            step = optimizer.state[at]["momentum_buffer"] if self.momentum else _gradient(at)
            lengths.append(self.rate * math.hypot(*step.tolist()))
            angles.append(_angle(step, gradient))
        numbers = {
            "lengths": torch.tensor(lengths, dtype=torch.float64),
            "angles": torch.tensor(angles, dtype=torch.float64),
        }
        return Walk(torch.stack(points), torch.stack(losses), **numbers, finite=finite)

    def still(self) -> Still:
        """Return the map with both walks of the first setting, and the ends of walks from two starts at two rates."""
        settings = [(w, rate) for w in (START["w"], 0.6) for rate in (START["rate"], SMALL_RATE)]
        walks = {
            (*setting, clipped): Clip(w=setting[0], rate=setting[1]).walk(clipped)
            for setting in settings
            for clipped in (False, True)
        }
        drawing, axes = figures.new()
        w, b = torch.meshgrid(torch.linspace(0.2, 1.4, 120), torch.linspace(-1, 1, 100), indexing="xy")
        axes.contourf(w, b, self.loss(w, b).clamp_min(1e-3).log10(), levels=14, cmap="Greys", alpha=0.8)
        for clipped, marker, colour in ((False, "s-", "unclipped"), (True, "o-", "clipped")):
            walk = walks[START["w"], START["rate"], clipped]
            near = walk.points.abs().amax(1) < 1e6  # further off nothing can be drawn
            style = {"color": figures.COLOURS[colour], "label": "with the bound" if clipped else "no bound"}
            axes.plot(*walk.points[near].T.numpy(), marker, markersize=3, **style)
        axes.plot(START["w"], START["b"], "o", markersize=8, color="black", label="start")
        axes.set(xlim=(0.2, 1.4), ylim=(-1, 1), ylabel="bias b", title="The loss from above")
        axes.set_xlabel("weight w (the greyer, the higher the loss)")
        figures.legend(axes)
        free, bounded = (walks[START["w"], START["rate"], clipped] for clipped in (False, True))
        shortened = int((bounded.lengths > 0.999 * START["rate"] * START["bound"]).sum())
        words = (
            f"From w = {START['w']} gradient descent at a rate of {START['rate']} has a loss too large for a number "
            f"after {len(free.lengths)} steps. A bound of {START['bound']:.0f} on the norm shortens {shortened} of "
            f"{STEPS} steps, to {bounded.lengths.max():.2f}; they end at a loss of {bounded.losses[-1]:.2f}."
        )
        rows = [
            [w, figures.power_of_ten(rate), "yes" if clipped else "no", *_summary(walk)]
            for (w, rate, clipped), walk in walks.items()
        ]
        return Still(drawing, words, ["from w", "rate", "bound", "steps", "longest", "last loss"], rows)


def _summary(walk: Walk) -> list[str]:
    """How many steps, the longest, and the last loss."""
    return [str(len(walk.lengths)), figures.power_of_ten(float(walk.lengths.max())), f"{walk.losses[-1]:.2f}"]


def _gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient, which is there."""
    assert parameter.grad is not None
    return parameter.grad


def _angle(a: Tensor, b: Tensor) -> float:
    """Between two vectors, in degrees, exact for small angles too; 0 where one is zero (twin: walk.js)."""
    p, q = (_unit(vector.tolist()) for vector in (a, b))
    apart, along = (math.hypot(*(x + sign * y for x, y in zip(p, q, strict=True))) for sign in (-1, 1))
    return math.degrees(2 * math.atan2(apart, along))


def _unit(vector: list[float]) -> list[float]:
    length = math.hypot(*vector)
    return [x / length if length > 0 else 0.0 for x in vector]
