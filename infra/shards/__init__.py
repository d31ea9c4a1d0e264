"""Shard sets: keys, tars, their byte index, and the ledger of what is committed; also the tars that others made."""
