"""Training with weights in bfloat16 or float8, and 4-bit rounding at its end."""
