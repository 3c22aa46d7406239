"""Tests the backbone for detection and segmentation."""
