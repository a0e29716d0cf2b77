"""Grokking under longer budgets, Muon tuned to an interior setting."""
