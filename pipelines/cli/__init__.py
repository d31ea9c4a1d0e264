"""The `ccsr` command line."""
