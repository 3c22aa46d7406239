"""Tests that a process sees through a shared descriptor which record another process is reading."""

import os

from beit3_ds.data.workers.current_record import CurrentRecord


def test_another_owner_of_the_memory_sees_the_name() -> None:
    ours = CurrentRecord()
    theirs = CurrentRecord(os.dup(ours.descriptor))
    ours.close_descriptor()
    assert theirs.get() == ""
    for name in ("s.tar:a", "é" * 2000, "short"):  # catches the rest of a longer name behind a shorter one
        ours.set(name)
        assert name.startswith(theirs.get().removesuffix("\ufffd"))
        assert len(theirs.get()) >= min(len(name), 500)
    theirs.close_descriptor()


def test_names_that_are_not_unicode_are_shown() -> None:
    record = CurrentRecord()
    record.set(os.fsdecode(b"caf\xe9"))  # catches an exception instead of a message
    assert record.get() == "caf?"
    record.close_descriptor()
