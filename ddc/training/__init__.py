"""The loop, checkpoints, records and their mirror in Weights & Biases."""
