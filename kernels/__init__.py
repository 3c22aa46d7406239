"""Implements the multiway model's operations on plain tensors; installed as `beit3_ds.kernels`."""
