"""Orders the samples of a stream; the order depends only on the seed, the data and the config."""
