"""Model applications: local (vLLM), remote (OpenAI-compatible HTTP), custom; and the controller of the pool."""
