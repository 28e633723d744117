"""Tools: what a call costs, which functions are offered, and what survives kills."""
