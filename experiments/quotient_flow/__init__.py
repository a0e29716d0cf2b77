"""The flow on the quotient."""
