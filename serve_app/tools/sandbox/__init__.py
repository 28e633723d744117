"""Runs untrusted Python: a warm server process that forks one confined child for each run."""
