"""Whether a learning rate that was tuned on a small model is the best of wider and deeper ones."""
