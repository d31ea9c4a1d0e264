"""From a position of the stream to a batch."""
