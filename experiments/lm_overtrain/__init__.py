"""A language model past the point of fit."""
