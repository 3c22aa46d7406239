"""Finds texts for images and images for texts (COCO and Flickr30K; paper section 3.1)."""
