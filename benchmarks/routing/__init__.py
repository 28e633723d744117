"""Routing quality on real outcome tables: `python -m benchmarks.routing`."""
