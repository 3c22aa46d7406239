"""Defines the error for failing file systems."""


class StorageError(Exception):
    """Reports that a file system failed or hung, or kept a file locked; the message names the file or folder.

    Not a `ConfigError`, because the same command succeeds once the file system works again. Not a `BrokenRecordError`,
    because the record itself may be valid.
    """
