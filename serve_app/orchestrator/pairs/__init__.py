"""How `model@tool` runs: one module per kind of tool."""
