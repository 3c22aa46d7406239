"""Defines the operations on packed rows, each with its PyTorch reference, registration and backward pass."""
