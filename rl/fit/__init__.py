"""Path 1 from outcomes: clusters, posteriors, the kernel head, and the choice of settings."""
