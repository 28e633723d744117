"""Running a decision: the step loop, its limits, and how each tool joins a model."""
