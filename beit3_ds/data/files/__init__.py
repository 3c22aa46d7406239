"""Files of a run: how they are found, opened, read and described."""
