"""What a model and a step cost, counted before anything runs."""
