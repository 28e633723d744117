"""The commands of the learning loop, and `atlas` as a whole."""
