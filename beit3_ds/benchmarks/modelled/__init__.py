"""Computes modelled GPU times of ops and training steps from assumed rates, for old and current kernels."""
