"""What `beit3 launch` runs: attempts, guards of the ranks, and restarts."""
