"""Measurements behind `beit3 bench`; their results stand in BENCHMARKS.md."""
