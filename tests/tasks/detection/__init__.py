"""Tests object detection."""
