"""Defines the `beit3` command; each subcommand has a module, which only calls the other packages."""
