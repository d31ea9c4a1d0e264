"""Finished shard sets: verified, cleaned, joined and exported."""
