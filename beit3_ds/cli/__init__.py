"""Defines the `beit3` command, with one module per subcommand that only calls the packages."""
