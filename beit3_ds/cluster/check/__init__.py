"""Finds faults of the machines of a run, for `beit3 check-cluster`."""
