"""Measures the ops and their baselines."""
