"""Measures the ops beside their baselines."""
