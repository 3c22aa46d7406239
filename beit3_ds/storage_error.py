"""Error for a file system that fails."""


class StorageError(Exception):
    """The file system that holds the data fails; the message names file, host and reason.

    It is not a `ConfigError`, because the same command works once the file system does. It is not a
    `BrokenRecordError`, because nothing is known about the record.
    """
