"""Sources of images and captions; decoding and augmentation of images."""
