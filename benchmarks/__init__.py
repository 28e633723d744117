"""Measurements of atlas-serve: each module answers one question; `python -m benchmarks.<name>`."""
