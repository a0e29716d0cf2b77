"""A language model far past the point of fit."""
