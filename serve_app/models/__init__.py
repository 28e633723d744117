"""Model applications (local, remote, custom) and the controller of the pool."""
