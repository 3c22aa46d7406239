"""Helps the ops on a CPU: allocates memory, divides rows into chunks, and computes matrix products."""
