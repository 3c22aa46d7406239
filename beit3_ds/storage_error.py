"""Defines the error that reports a failing file system."""


class StorageError(Exception):
    """Reports that a file system failed, hung or kept a file locked; the message names the file or folder.

    This is not a `ConfigError`, because the same command succeeds once the file system works again. It is not a
    `BrokenRecordError` either, because a record that was not read may be correct.
    """
