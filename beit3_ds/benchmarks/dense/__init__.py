"""Compares detection and segmentation with libraries around the same trunk."""
