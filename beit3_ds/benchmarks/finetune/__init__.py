"""Benchmarks of fine-tuning steps and of caption generation."""
