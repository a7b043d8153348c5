"""Watch, bound and threshold gradients (chapters 1 to 3)."""
