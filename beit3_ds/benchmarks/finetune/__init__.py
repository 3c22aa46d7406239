"""Benchmarks fine-tuning steps and the generation of captions."""
