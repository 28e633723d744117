"""Learning: trains, evaluates and publishes router policies. Imports `serve_app`; never the reverse."""
