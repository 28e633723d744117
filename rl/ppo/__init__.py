"""Path 2: PPO on a profile or on the running pool; outcomes in, trained weights out."""
