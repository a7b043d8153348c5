"""Watch, bound and threshold gradients; prune weights exactly and keep them pruned."""

__version__ = "0.1.0"
