"""From LR images of any size to restored ones."""
