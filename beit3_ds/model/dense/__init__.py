"""Implements parts of the backbone that only detection and segmentation use."""
