"""Equivariance."""
