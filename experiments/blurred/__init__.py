"""Rates at sites that a gauge can blur."""
