"""Models GPU times of ops and training steps from stated rates, before and after the work on the kernels."""
