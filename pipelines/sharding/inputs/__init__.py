"""Kinds of image sets: lists, zips, tars and parquet, existing pairs."""
