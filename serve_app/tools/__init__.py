"""Tools: what a model can use besides its weights. They run as Ray tasks, never in the gateway."""
