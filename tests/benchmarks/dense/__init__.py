"""Tests the benchmarks of detection and segmentation."""
