"""Image sets to degraded WebDataset shards."""
