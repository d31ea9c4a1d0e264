"""Where each sample's bytes are: our shards' byte index, and the tars that others made."""
