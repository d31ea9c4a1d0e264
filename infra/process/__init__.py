"""One process's threads, memory and numerics."""
