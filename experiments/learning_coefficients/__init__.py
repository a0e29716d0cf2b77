"""Known learning coefficients."""
