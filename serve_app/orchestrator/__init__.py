"""Running a decision: the step loop, its deadline and budget, and how each kind of tool joins a model."""
