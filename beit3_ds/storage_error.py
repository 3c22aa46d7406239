"""The error of a file system that fails."""


class StorageError(Exception):
    """The file system that holds the data fails; the message names file, host and reason.

    It is no `ConfigError`: the same command can work once the file system does. It is no `BrokenRecord`: nothing is
    known about the record.
    """
