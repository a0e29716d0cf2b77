"""The range of learning rates that end near the best, from well and from badly scaled starts."""
