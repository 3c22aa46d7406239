"""Defines the error of a file system that fails."""


class StorageError(Exception):
    """Reports an error of the file system that holds the data; the message names file, host and reason.

    It is not a `ConfigError`, because the same command works once the file system does. It is not a
    `BrokenRecordError`, because nothing is known about the record.
    """
