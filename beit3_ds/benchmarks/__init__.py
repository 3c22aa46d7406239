"""Benchmarks that `beit3 bench` runs; BENCHMARKS.md has their results."""
