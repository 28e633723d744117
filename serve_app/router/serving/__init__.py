"""What keeps a router replica's rules equal to what the store says serves."""
