"""Sharpness and learning coefficient at the end of training."""
