"""Locations, reads and whole-or-nothing writes by path or s3:// URI, and third-party weight files."""
