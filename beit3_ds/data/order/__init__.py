"""Orders the samples of a stream as a pure function of the seed and the position in the stream."""
