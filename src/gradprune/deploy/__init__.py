"""What a model costs (chapter 4)."""
