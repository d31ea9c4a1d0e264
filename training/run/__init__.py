"""One training run: driver, workers, stages, checkpoints, validation."""
