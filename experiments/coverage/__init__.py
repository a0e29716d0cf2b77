"""Coverage of the intervals of rates."""
