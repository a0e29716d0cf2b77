"""Analytic rates."""
