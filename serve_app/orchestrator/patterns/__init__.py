"""Ways to answer a request: one module per pattern."""
