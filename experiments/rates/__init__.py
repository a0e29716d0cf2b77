"""Dead-direction rates and learning coefficients."""
