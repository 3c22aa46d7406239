"""Tests tar headers: members as the standard library finds them, and errors where it finds none."""

import io
import os
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from beit3_ds.data.images.tar_members import TarError, TarMember, iterate_tar_members

ReadMembers = Callable[[bytes], list[TarMember]]

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.fixture
def read_members(tmp_path: Path) -> ReadMembers:
    """Provides a function that writes bytes to a file and reads the members of that tar."""

    def read(data: bytes) -> list[TarMember]:
        (tmp_path / "x.tar").write_bytes(data)
        descriptor = os.open(tmp_path / "x.tar", os.O_RDONLY)
        try:
            return list(iterate_tar_members(descriptor))
        finally:
            os.close(descriptor)

    return read


def _tar(infos: Iterable[tarfile.TarInfo], tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format, errors="surrogateescape") as archive:
        for info in infos:
            archive.addfile(info, io.BytesIO(b"x" * info.size))
    return buffer.getvalue()


def _info(name: str, size: int = 3, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, target
    return info


@pytest.mark.parametrize("tar_format", FORMATS)
def test_members_are_those_of_the_standard_library(read_members: ReadMembers, tar_format: str) -> None:
    names = ["a.txt", "folder/" + "n" * 80 + "/b.jpg", "m" * 60 + "/" + "ü" * 30 + ".png", "caf\udce9.txt"]
    names += ["deep/" * 18 + "c.webp"] + ([] if tar_format == "ustar" else ["d" * 300])  # long names of all formats
    infos = [_info(name, size) for size, name in zip((0, 1, 512, 513, 5000, 7), names, strict=False)]
    infos.insert(2, _info("folder", 0, tarfile.DIRTYPE))
    data = _tar(infos, FORMATS[tar_format])
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape") as archive:
        expected = [(i.name, i.offset_data, i.size, "") for i in archive if i.isfile()]
    assert [tuple(member) for member in read_members(data)] == expected
    assert len(expected) == len(names)


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (_info("a.jpg", 0, tarfile.SYMTYPE, "/etc/passwd"), "link"),
        (_info("a.jpg", 0, tarfile.LNKTYPE, "b.jpg"), "link"),
        (_info("a.jpg", 0, tarfile.FIFOTYPE), "special file"),
        (_info("a.jpg", 0, tarfile.CHRTYPE), "special file"),
        (_info("a.jpg", 4, tarfile.GNUTYPE_SPARSE), "sparse file"),
        (_info("/a.jpg"), "unsafe name"),
        (_info("b/../../a.jpg"), "unsafe name"),
        (_info("..a/b..jpg"), ""),  # catches a rule that takes any two dots for the parent folder
    ],
)
def test_members_that_must_not_be_read(read_members: ReadMembers, info: tarfile.TarInfo, reason: str) -> None:
    members = read_members(_tar([info, _info("next.txt")]))
    assert [member.skip_reason for member in members] == [reason, ""]
    assert members[1].name == "next.txt"  # catches a reader that loses its place behind a special member


def test_a_pax_name_and_size_replace_those_of_the_header(read_members: ReadMembers) -> None:
    info = _info("short", 600)
    info.pax_headers = {"path": "ü/long", "comment": "x"}
    members = read_members(_tar([info, _info("b")], tarfile.PAX_FORMAT))
    assert [(member.name, member.size) for member in members] == [("ü/long", 600), ("b", 3)]


def test_the_pax_size_counts_where_the_header_has_no_room_for_it(read_members: ReadMembers) -> None:
    record = b"12 size=700\n"
    extended = _info("pax", len(record), tarfile.XHDTYPE).tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0")
    header = _info("a", 0).tobuf(tarfile.USTAR_FORMAT)
    members = read_members(extended + header + bytes([1]) * 1024 + _tar([_info("b")]))
    assert [(member.name, member.size) for member in members] == [("a", 700), ("b", 3)]


def test_a_link_has_no_data_whatever_its_header_says(read_members: ReadMembers) -> None:
    link = _info("a", 600, tarfile.LNKTYPE, "b").tobuf(tarfile.USTAR_FORMAT)  # some writers give the target's size
    assert [member.name for member in read_members(link + _tar([_info("b")]))] == ["a", "b"]


def test_sizes_beyond_octal_digits(read_members: ReadMembers) -> None:
    big = _info("big", 9 << 30).tobuf(tarfile.GNU_FORMAT)  # base 256
    with pytest.raises(TarError, match="truncated at byte 512, in the data of 'big'"):
        read_members(big)


def _signed(header: bytearray) -> bytes:
    """Returns a header with a correct checksum."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize(
    "size", [b"\xff" * 11 + b"\x00", b"-0000001000\0", b"0o777777777\0", b"1_0\0".ljust(12, b"\0")]
)
def test_numbers_that_would_lead_backwards_are_refused(read_members: ReadMembers, size: bytes) -> None:
    header = bytearray(_tar([_info("a")])[:512])
    header[124:136] = size
    with pytest.raises(TarError, match="is not a number"):  # tarfile follows some of them in a circle
        read_members(_signed(header) + bytes(2048))


def test_an_extended_header_cannot_claim_memory(read_members: ReadMembers) -> None:
    header = bytearray(_info("a", 1 << 31, tarfile.XHDTYPE).tobuf(tarfile.USTAR_FORMAT))
    with pytest.raises(TarError, match="extended header of 2147483648 bytes"):
        read_members(bytes(header) + bytes(2048))


def test_data_behind_the_end_are_refused(read_members: ReadMembers) -> None:
    data = _tar([_info("a")])
    assert len(read_members(data + bytes(7000))) == 1
    with pytest.raises(TarError, match="second tar appended"):  # tarfile silently leaves the second one out
        read_members(data + data)


def test_every_truncation_is_noticed(read_members: ReadMembers) -> None:
    data = _tar([_info("folder/" + "l" * 200, 700), _info("b", 20)], tarfile.PAX_FORMAT)
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512  # of the last member's data
    for kept in range(0, end, 37):
        with pytest.raises(TarError, match="truncated"):
            read_members(data[:kept])
    assert len(read_members(data[: end + 512])) == 2
