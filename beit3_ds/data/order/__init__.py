"""Orders the samples of a stream: the images, the image-text pairs or the texts of a run.

The order depends only on the seed, the data and the config.
"""
