"""Watch, bound and threshold gradients; prune weights exactly and keep them pruned."""

from gradprune.core.select import keep_largest, kth_smallest
from gradprune.deploy.compress import Compressed, compress
from gradprune.deploy.export import Exported, export
from gradprune.deploy.pack import Packed, pack
from gradprune.deploy.quantize import Quantized, dequantize, quantize
from gradprune.deploy.recalibrate import recalibrate_
from gradprune.deploy.report import Report, Row, report
from gradprune.deploy.share import Shared, share_weights
from gradprune.deploy.shrink import shrink
from gradprune.deploy.unpack import unpack
from gradprune.deploy.widths import load, save
from gradprune.gradients.autoclip import AutoClip
from gradprune.gradients.clip import clip_adaptive_, clip_by_norm_, clip_by_value_
from gradprune.gradients.cliplog import ClipLog
from gradprune.gradients.feedback import ErrorFeedback
from gradprune.gradients.jacobian import jacobian_singular_values
from gradprune.gradients.probe import gradient_norms
from gradprune.gradients.recorder import Recorder
from gradprune.gradients.sparsify import keep_top_gradients_, threshold_gradients_
from gradprune.gradients.trace import Trace
from gradprune.recovery.budget import fit_budget
from gradprune.recovery.correct import iterate
from gradprune.recovery.crossval import CrossValidation, cross_validate
from gradprune.recovery.distill import distill_loss
from gradprune.recovery.found import Found, Look
from gradprune.recovery.history import Entry, History, Round
from gradprune.recovery.largest import largest_sparsity
from gradprune.recovery.planned import Plan
from gradprune.recovery.reconstruct import reconstruct_
from gradprune.recovery.reconstruct_file import Reconstructed, reconstruct_file
from gradprune.recovery.scan import Sensitivity, sensitivity
from gradprune.recovery.search import search
from gradprune.recovery.study import Study, Trial
from gradprune.scale.topk import TopK
from gradprune.weights.activation import activation
from gradprune.weights.event import Event
from gradprune.weights.flow import synflow
from gradprune.weights.hold import Hold
from gradprune.weights.mask import Masks
from gradprune.weights.prune import prune
from gradprune.weights.pruner import Pruner
from gradprune.weights.regrow import Regrow
from gradprune.weights.schedule import Cubic, Geometric, Linear, OneShot
from gradprune.weights.score import magnitude, random, rotation
from gradprune.weights.sensitivity import fisher, gradient, grasp, movement, snip, taylor

__version__ = "0.1.0"

__all__ = [
    "AutoClip",
    "ClipLog",
    "Compressed",
    "CrossValidation",
    "Cubic",
    "Entry",
    "ErrorFeedback",
    "Event",
    "Exported",
    "Found",
    "Geometric",
    "History",
    "Hold",
    "Linear",
    "Look",
    "Masks",
    "OneShot",
    "Packed",
    "Plan",
    "Pruner",
    "Quantized",
    "Reconstructed",
    "Recorder",
    "Regrow",
    "Report",
    "Round",
    "Row",
    "Sensitivity",
    "Shared",
    "Study",
    "TopK",
    "Trace",
    "Trial",
    "activation",
    "clip_adaptive_",
    "clip_by_norm_",
    "clip_by_value_",
    "compress",
    "cross_validate",
    "dequantize",
    "distill_loss",
    "export",
    "fisher",
    "fit_budget",
    "gradient",
    "gradient_norms",
    "grasp",
    "iterate",
    "jacobian_singular_values",
    "keep_largest",
    "keep_top_gradients_",
    "kth_smallest",
    "largest_sparsity",
    "load",
    "magnitude",
    "movement",
    "pack",
    "prune",
    "quantize",
    "random",
    "recalibrate_",
    "reconstruct_",
    "reconstruct_file",
    "report",
    "rotation",
    "save",
    "search",
    "sensitivity",
    "share_weights",
    "shrink",
    "snip",
    "synflow",
    "taylor",
    "threshold_gradients_",
    "unpack",
]
