"""Score weights, choose which go, and hold them at zero (chapter 4)."""
