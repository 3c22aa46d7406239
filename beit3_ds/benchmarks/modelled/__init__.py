"""Models GPU times of ops and training steps from assumed rates, for the old and the current kernels."""
