"""Is one method better than another, seed by seed, and may one say so?"""

from __future__ import annotations

from gradprune.core.paired import Difference, holm, paired

__all__ = ["Difference", "holm", "paired"]
