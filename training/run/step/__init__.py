"""What one update computes: the stage's loss, its critic, the engine that steps."""
