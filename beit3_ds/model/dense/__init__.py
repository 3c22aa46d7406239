"""Implements the parts of a backbone for detection and segmentation that pretraining does not need."""
