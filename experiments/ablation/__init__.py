"""What the complete gauge group changes."""
