"""What leaves images out: filters and near-duplicates."""
