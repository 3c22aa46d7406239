"""Runs worker processes that prepare items ahead; every wait for them has a time limit."""
