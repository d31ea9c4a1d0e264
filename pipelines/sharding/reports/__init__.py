"""What a finished shard set says of itself: data card, MLflow run."""
