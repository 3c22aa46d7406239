"""What `beit3 check-cluster` asks of the nodes of a run, and what it finds wrong."""
