"""Runs worker processes that prepare items in advance; every wait for a worker has a time limit."""
