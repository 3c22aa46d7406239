"""Benchmarks of reading and preparing data."""
