"""Orders the samples as a pure function of the seed and the position."""
