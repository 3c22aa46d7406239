"""Benchmarks fine-tuning steps and caption generation."""
