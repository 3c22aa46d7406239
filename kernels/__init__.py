"""Implements the operations of the multiway model as functions of plain tensors; installed as `beit3_ds.kernels`."""
