"""The commands of `atlas` for serving."""
