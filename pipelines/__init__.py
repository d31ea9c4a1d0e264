"""Floor 5: what a user runs."""
