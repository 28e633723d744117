"""Hostile requests, engines and model texts against one real gateway."""
