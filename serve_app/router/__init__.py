"""Decisions: which (model, tool) pair gets a query."""
