"""One process: its Ray, threads, memory and numerics."""
