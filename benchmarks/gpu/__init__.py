"""Checks, speed and training on a GPU, in stages that a quarter of an hour holds: ``make gpu``."""
