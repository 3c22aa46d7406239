"""Benchmarks saving, loading and exporting checkpoints."""
