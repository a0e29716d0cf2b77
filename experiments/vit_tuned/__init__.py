"""The vision transformer, both optimizers tuned to interior settings, capacity at equal decay."""
