"""Benchmarks of saving, loading and exporting."""
