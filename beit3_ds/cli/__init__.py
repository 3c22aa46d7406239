"""Defines the `beit3` command, with one module per subcommand; the work is done in the other packages."""
