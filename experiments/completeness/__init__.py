"""What of a network's symmetries is found."""
