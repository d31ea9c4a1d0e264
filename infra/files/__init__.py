"""Locations, whole-or-nothing writes, and third-party weight files."""
