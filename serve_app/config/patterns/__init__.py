"""Patterns: their language, what is checked when they are read, and their worst case."""
