"""Metrics of images and of runs."""
