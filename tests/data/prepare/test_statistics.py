"""Tests statistics of a run's files, the picture of samples, and the commands that show them."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit3_ds.cli import main as cli
from beit3_ds.config import DataConfig, SourceConfig, StreamConfig
from beit3_ds.data.images.shards import TarShards
from beit3_ds.data.prepare.contact_sheet import draw_contact_sheet
from beit3_ds.data.prepare.statistics import describe_streams, examine_source
from beit3_ds.data.sources import spread
from tests.data.conftest import BuildConfig, WriteTar


def _png(width: int, height: int, color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def pairs(tmp_path: Path, write_tar: WriteTar) -> TarShards:
    """Writes six pairs, of which two have a broken image and one a broken caption, and a member that is skipped."""
    members = {f"{i}.png": _png(10 * (i + 1), 100) for i in range(4)} | {"4.png": b"", "5.png": b""}
    members |= {f"{i}.txt": b"word " * (i + 1) for i in range(5)} | {"5.txt": b"", "../6.png": b""}
    return TarShards([write_tar(tmp_path / "p.tar", members)])


def test_statistics_count_what_is_there_and_what_is_broken(pairs: TarShards) -> None:
    statistics = examine_source(pairs, with_captions=True, max_examined=100)
    assert statistics.numbers["image width"] == [10, 20, 30, 40]
    assert statistics.numbers["caption words"] == [1, 2, 3, 4, 5]  # of the broken image 4, too
    tar = pairs.paths[0]
    assert sorted(message for messages in statistics.broken.values() for message in messages) == [
        f"{tar}:4: broken image: empty file",
        f"{tar}:5: broken caption: empty caption",
        f"{tar}:5: broken image: empty file",
    ]
    assert statistics.num_broken == 2
    lines = statistics.describe()
    assert lines[0] == "6 samples, 6 of them examined"
    assert "image width: 0%: 10, 10%: 13, 50%: 25, 90%: 37, 100%: 40" in lines
    place = lines.index("broken: 2 of 6:")
    # catches broken files without their names
    assert lines[place + 1 : place + 3] == [f"  {tar}:{key}: broken image: empty file" for key in (4, 5)]
    assert "text: 'word word word word word'" in lines
    assert lines[-1].startswith("left out: 1: unsafe name")
    assert statistics.problems(max_broken_records=2) == []
    assert "2 of 6 examined samples are broken" in statistics.problems(max_broken_records=1)[0]


def test_reasons_do_not_differ_from_record_to_record(tmp_path: Path, write_tar: WriteTar) -> None:
    broken = {f"{i}.png": _png(9, 9)[: 40 + i] for i in range(4)} | {"x.png": b"none", "y.png": b"of"}
    statistics = examine_source(TarShards([write_tar(tmp_path / "b.tar", broken)]), False, 100)
    assert statistics.num_broken == 6
    assert max(map(len, statistics.broken.values())) >= 2  # catches names or addresses kept in a reason
    assert len(statistics.broken) <= 3
    assert statistics.problems(max_broken_records=100) == ["none of 6 examined samples can be read"]


def test_numbers_of_a_message_are_shown_and_names_are_bounded(tmp_path: Path, write_tar: WriteTar) -> None:
    members = {f"{i:02}.png": bytes(1) for i in range(15)} | {f"{i:02}.txt": b"x" * (70000 + i) for i in range(15)}
    lines = examine_source(TarShards([write_tar(tmp_path / "b.tar", members)]), True, 100).describe()
    assert any("caption of 70003 bytes exceeds the limit of 65536" in line for line in lines)  # catches blanked numbers
    assert sum("caption of 700" in line for line in lines) == 10
    assert lines.count("  ... and 5 more of this kind") == 2


def test_texts_that_a_person_would_notice_are_shown(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(
        "fine caf\u00e9\ncaf\u00c3\u00a9\n\u00e2\u20ac\u2122s\nbroken \ufffd\n" + "\x1b[1m" + "long " * 99
    )
    none = StreamConfig(train=(), samples_per_step=0)
    texts = StreamConfig(train=(SourceConfig(path=str(tmp_path / "a.txt")),), samples_per_step=1)
    report = describe_streams(DataConfig(images=none, pairs=none, texts=texts), 10).text
    assert "suspicious: 2 of 5 texts hold what looks like UTF-8 read as Latin-1, such as 'caf\u00c3\u00a9'" in report
    assert "suspicious: 1 of 5 texts hold U+FFFD" in report
    assert "text: 'fine caf\u00e9'" in report
    assert "text: '\\x1b[1mlong long" in report  # catches control characters that change the terminal


def test_samples_are_spread() -> None:
    assert spread(10, 4) == [0, 3, 6, 9]  # catches a look at the beginning alone
    assert spread(3, 10) == [0, 1, 2]
    assert spread(5, 1) == [0]


def test_contact_sheet_shows_every_sample(pairs: TarShards, tmp_path: Path, write_tar: WriteTar) -> None:
    members = {"a.png": _png(1, 3000), "b.png": _png(3000, 1), "b.txt": "ü 雪 \U0001f426 ".encode() * 99}
    thin = TarShards([write_tar(tmp_path / "thin.tar", members)])
    sheet = np.asarray(draw_contact_sheet({"pairs": pairs, "thin": thin}))
    assert sheet.shape[1] == 1136
    places = [(50 + 60, 100 + 188 * column) for column in range(6)]
    colors = [tuple(sheet[place].tolist()) for place in places]
    assert colors == [(255, 0, 0)] * 4 + [(255, 228, 225)] * 2


def test_all_streams_are_described(build_config: BuildConfig) -> None:
    config = build_config().data
    text = describe_streams(config, 10).text
    (images,), (pairs,) = config.images.train, config.pairs.validation
    assert f"images train {images.path}:\n  22 samples, 10 of them examined" in text
    assert f"pairs validation {pairs.path}:\n  13 samples" in text
    assert "caption words" in text.partition("pairs train")[2]
    assert "caption" not in text.partition("pairs train")[0]
    assert "1 files of " in text.partition("texts train")[2]
    assert "paragraph words" in text


def test_broken_lines_of_one_reason_are_counted_together(tmp_path: Path) -> None:
    (tmp_path / "a: b.txt").write_bytes(b"one\ncaf\xe9\nlonger caf\xe9\n")
    none = StreamConfig(train=(), samples_per_step=0)
    texts = StreamConfig(train=(SourceConfig(path=str(tmp_path / "a: b.txt")),), samples_per_step=1)
    report = describe_streams(DataConfig(images=none, pairs=none, texts=texts), 10).text
    assert "  3 paragraphs examined\n  paragraph characters: " in report
    # catches a reason that keeps the place or the file's name, and lines that are not named
    reason = "not UTF-8: unexpected end of data at byte"
    named = [f"    {tmp_path}/a: b.txt:{number}: {reason} {byte} of the line" for number, byte in ((2, 3), (3, 10))]
    assert report.endswith("\n".join(["  broken: 2 of 3:", *named]))


@pytest.fixture
def config_file(tmp_path: Path, sample_files: dict[str, str]) -> Path:
    """Writes the quickstart configuration with copies of the small sample files and a folder for indices."""
    content = json.loads((Path(cli.__file__).parents[2] / "ds_configs/quickstart_cpu.json").read_text())
    data = content["beit3_ds"]["data"]
    for part in ("samples", "validation"):
        shutil.copytree(Path(sample_files["texts"]).parent, tmp_path / part)
    for name, path in sample_files.items():
        parts = (str(tmp_path / part / Path(path).name) for part in ("samples", "validation"))
        data[name] |= {part: [pattern] for part, pattern in zip(("train", "validation"), parts, strict=True)}
    data["cache_dir"] = str(tmp_path / "prepared")
    (tmp_path / "run.json").write_text(json.dumps(content))
    return tmp_path / "run.json"


def test_prepare_commands(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = ["prepare", "index", str(config_file), "--processes", "1"]
    for arguments, expected in ((index, "8 written"), (index, "8 kept"), ([*index, "--verify"], "8 verified")):
        assert cli.main(arguments) == 0
        assert capsys.readouterr().out == f"8 tars with 70 samples: {expected}\n"
    out = config_file.parent / "sheet.png"
    assert cli.main(["prepare", "stats", str(config_file), "--samples", "3", "--out", str(out)]) == 0
    assert "22 samples, 3 of them examined" in capsys.readouterr().out
    with Image.open(out) as sheet:
        assert sheet.format == "PNG"

    tar = config_file.parent / "samples/pairs-0.tar"
    tar.write_bytes(tar.read_bytes() + bytes(512))
    assert cli.main([*index, "--verify"]) == 2
    assert "pairs-0.tar has size" in capsys.readouterr().err
    assert cli.main([*index[:-1], "0"]) == 2
    assert "--processes: it is 0" in capsys.readouterr().err
    assert cli.main(["prepare", "stats", str(config_file), "--out", "/no/such/folder/x.png"]) == 2


def test_prepare_index_writes_tables_of_annotations(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = {"images": [{"id": 1, "file_name": "1.png"}], "annotations": [{"image_id": 1, "caption": "a bird"}]}
    (config_file.parent / "captions.json").write_text(json.dumps(captions))
    content = json.loads(config_file.read_text())
    source = {"path": str(config_file.parent / "captions.json"), "format": "coco", "images": str(config_file.parent)}
    content["beit3_ds"]["data"]["pairs"]["validation"] = [source]
    (config_file.parent / "1.png").write_bytes(_png(3, 3))
    config_file.write_text(json.dumps(content))
    for arguments, expected in (([], "1 tables written, 0 verified"), (["--verify"], "0 tables written, 1 verified")):
        assert cli.main(["prepare", "index", str(config_file), "--processes", "1", *arguments]) == 0
        assert capsys.readouterr().out.endswith(f"\n1 annotation files with 1 samples: {expected}\n")


def test_stats_of_broken_files_end_with_a_status(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = config_file.parent / "broken"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.jpg").write_bytes(b"no image")
    stats = ["prepare", "stats", str(config_file), f'--set=data.images.train=["{folder}"]']
    assert cli.main(stats) == 1  # catches 60 of 60 broken files and status 0
    assert f"problem: images train {folder}: none of 60 examined samples can be read" in capsys.readouterr().err


def test_a_wrong_folder_of_images_is_refused(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = config_file.parent
    (folder / "images").mkdir()
    shutil.copy(folder / "samples/text.txt", folder / "images/here.png")
    (folder / "images/picture.png").write_bytes(_png(3, 3))
    captions = {
        "images": [{"id": i, "file_name": f"{name}.png"} for i, name in enumerate(("here", "there", "gone"))],
        "annotations": [{"image_id": i, "caption": "a bird"} for i in range(3)],
    }
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "rows.tsv").write_text("a bird\thttp://x/0.png\n")

    def index(path: str, form: str, images: str) -> int:
        source = {"path": str(folder / path), "format": form, "images": str(folder / images)}
        setting = f"--set=data.pairs.validation={json.dumps([source])}"
        return cli.main(["prepare", "index", str(config_file), "--processes", "1", setting])

    assert index("captions.json", "coco", "samples") == 2  # catches a table that is written without an image
    assert "none of 3 images that" in capsys.readouterr().err
    assert index("captions.json", "coco", "nowhere") == 2
    assert "nowhere cannot be listed" in capsys.readouterr().err
    assert index("rows.tsv", "conceptual_captions", "images") == 2
    assert "no row of" in capsys.readouterr().err
    assert index("captions.json", "coco", "images") == 0
    assert "2 of 3 images are missing" in capsys.readouterr().out
