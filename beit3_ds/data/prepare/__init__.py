"""What `beit3 prepare` writes and shows before a run."""
