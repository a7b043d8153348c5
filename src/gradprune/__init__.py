"""Watch, bound and threshold gradients; prune weights exactly and keep them pruned."""

from gradprune.probe import Recorder, Trace, gradient_norms, jacobian_singular_values

__version__ = "0.1.0"
__all__ = ["Recorder", "Trace", "gradient_norms", "jacobian_singular_values"]
