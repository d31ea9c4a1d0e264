"""What a run measures and reports while it trains."""
