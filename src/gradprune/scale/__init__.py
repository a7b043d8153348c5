"""Train over several processes (chapters 3 and 4)."""
