"""Sources of images and captions, and the decoding and augmentation of images."""
