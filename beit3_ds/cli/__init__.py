"""The `beit3` command: one module per command, each thin over the packages."""
