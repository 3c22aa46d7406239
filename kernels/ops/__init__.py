"""Defines the operations on packed streams: reference, registration and backward pass of each."""
