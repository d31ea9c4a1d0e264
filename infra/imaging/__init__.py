"""Image files in and out, pictures and videos as people keep them, and what is measured of their pixels."""
