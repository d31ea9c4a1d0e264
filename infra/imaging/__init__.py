"""Pictures and videos as people keep them, and what is measured of their pixels."""
