"""Finds faults of a run's nodes, for `beit3 check-cluster`."""
