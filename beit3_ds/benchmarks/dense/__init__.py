"""Compares detection, segmentation and window attention with other implementations."""
