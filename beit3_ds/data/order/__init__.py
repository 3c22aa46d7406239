"""Order of the samples: a pure function of the seed and the position."""
