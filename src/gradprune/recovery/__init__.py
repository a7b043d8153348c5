"""Get back what pruning cost (chapter 5)."""
