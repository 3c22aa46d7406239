"""Tests that result files refused by a disk are reported once and written later."""

from pathlib import Path

from beit3_ds.retrying.folder import ResultFolder


def test_a_file_that_the_disk_refuses_is_written_later(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "run").write_text("in the way")
    folder = ResultFolder(tmp_path / "run", said.append)
    pages = folder.inside("validation")
    for text in ("old", "new"):  # the second replaces what the first would have written
        assert not pages.write("page.html", lambda path, text=text: path.write_text(text))
    folder.retry()
    assert folder.missing == [tmp_path / "run" / "validation" / "page.html"]
    assert len(said) == 2 and said[0].startswith(f"WARNING: {folder.missing[0]} was not written: ")
    (tmp_path / "run").unlink()
    folder.retry()
    assert folder.missing == pages.missing == [] and said[2:] == [f"{tmp_path}/run/validation/page.html is written now"]
    assert (tmp_path / "run" / "validation" / "page.html").read_text() == "new"


def test_an_error_of_the_content_is_reported_and_not_repeated(tmp_path: Path) -> None:
    """Catches an error while content is created, such as a missing font, that fails a finished run or is retried."""
    said: list[str] = []
    folder = ResultFolder(tmp_path, said.append)

    def draw(path: Path) -> None:
        raise ValueError("no font\nof that name")

    assert not folder.write("losses.png", draw)
    folder.retry()
    assert folder.missing == [] and said == [
        f"WARNING: {tmp_path}/losses.png was not written: ValueError: no font of that name"
    ]


def test_a_whole_path_may_be_elsewhere(tmp_path: Path) -> None:
    folder = ResultFolder(tmp_path / "run", print)
    assert folder.write(tmp_path / "elsewhere" / "codes.png", lambda path: path.touch())
    assert (tmp_path / "elsewhere" / "codes.png").exists()
