"""Evaluation: what a policy would have reached on held-out questions and on logged traffic."""
