"""Finds faults of the nodes of a run, for `beit3 check-cluster`."""
