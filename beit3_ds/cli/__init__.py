"""Defines the `beit3` command, with one module per subcommand, each thin over the packages."""
