"""`ccsr estimate` and `--dry-run`: what jobs will take."""
