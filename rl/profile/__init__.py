"""Profiling: asks every pair every labelled question and keeps what happened."""
