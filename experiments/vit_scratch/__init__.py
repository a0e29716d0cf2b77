"""A vision transformer from scratch."""
