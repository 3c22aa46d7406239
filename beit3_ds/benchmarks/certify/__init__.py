"""Writes the report of `beit3 certify` about a machine with GPUs."""
