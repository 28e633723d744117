"""The versioned router artifact, where it is kept, and the rule built from it."""
