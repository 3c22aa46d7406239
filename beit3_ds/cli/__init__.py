"""The `beit3` command: thin over the packages."""
