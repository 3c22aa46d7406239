"""Classifies images by retrieving class names (ImageNet; paper section 3.2)."""
