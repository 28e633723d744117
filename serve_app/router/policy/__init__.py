"""What the learned policy reads, and its network: shared by training and serving."""
