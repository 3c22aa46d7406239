"""Defines the operations on packed rows, each with a PyTorch reference, a registration and a backward pass."""
