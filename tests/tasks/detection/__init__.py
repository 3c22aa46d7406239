"""Tests the detection of objects."""
