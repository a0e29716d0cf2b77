"""Averages of two fine-tuned runs, as they are and after both were moved to one gauge."""
