"""Benchmarks the saving, loading and exporting of checkpoints."""
