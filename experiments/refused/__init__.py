"""Configurations that are refused."""
