"""How the cost of deciding, storing and serving grows, and what some traffic needs."""
