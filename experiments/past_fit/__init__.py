"""A language model far past the point of fit, where AdamW's gap is the paper's."""
