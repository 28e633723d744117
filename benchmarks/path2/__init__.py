"""What path 2 is worth: in and out of distribution, by steps, under changes, by its parts."""
