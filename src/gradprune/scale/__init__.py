"""Train over several processes (chapter 9)."""
