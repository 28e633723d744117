"""Learning: trains, evaluates and publishes policies. Imports `serve_app`, never the reverse."""
