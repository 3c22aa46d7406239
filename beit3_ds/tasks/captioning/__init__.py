"""Describes images in words (COCO and nocaps; paper section 3.1)."""
