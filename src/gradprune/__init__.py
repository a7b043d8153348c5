"""Watch, bound and threshold gradients; prune weights exactly and keep them pruned."""

from gradprune.clip import AutoClip, clip_adaptive_, clip_by_norm_, clip_by_value_
from gradprune.cliplog import ClipLog
from gradprune.correct import History, Round, distill_loss, iterate
from gradprune.mask import Masks
from gradprune.probe import Recorder, Trace, gradient_norms, jacobian_singular_values
from gradprune.prune import Pruner, Regrow, prune
from gradprune.report import report
from gradprune.schedule import Cubic, Geometric, Linear, OneShot
from gradprune.score import (
    activation,
    fisher,
    gradient,
    grasp,
    magnitude,
    movement,
    random,
    rotation,
    snip,
    synflow,
    taylor,
)
from gradprune.select import keep_largest, kth_smallest
from gradprune.sparsify import ErrorFeedback, keep_top_gradients_, threshold_gradients_

__version__ = "0.1.0"

__all__ = [
    "AutoClip",
    "ClipLog",
    "Cubic",
    "ErrorFeedback",
    "Geometric",
    "History",
    "Linear",
    "Masks",
    "OneShot",
    "Pruner",
    "Recorder",
    "Regrow",
    "Round",
    "Trace",
    "activation",
    "clip_adaptive_",
    "clip_by_norm_",
    "clip_by_value_",
    "distill_loss",
    "fisher",
    "gradient",
    "gradient_norms",
    "grasp",
    "iterate",
    "jacobian_singular_values",
    "keep_largest",
    "keep_top_gradients_",
    "kth_smallest",
    "magnitude",
    "movement",
    "prune",
    "random",
    "report",
    "rotation",
    "snip",
    "synflow",
    "taylor",
    "threshold_gradients_",
]
