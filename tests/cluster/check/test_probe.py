"""Tests the probe's answers about this machine, and that the probe imports only the standard library."""

import ast
import os
import socket
import sys
from pathlib import Path

import pytest

from beit3_ds.cluster.check import node_connection, probe
from beit3_ds.cluster.check.probe import Probe, existing_parent, parse_gpus
from tests.listeners import listeners

# What nvidia-smi prints for --query-gpu=name,memory.total,memory.used --format=csv,noheader,nounits: recorded text from
# its documentation and from reports of users; none of it was seen on a GPU of ours.
RECORDED = {
    "two GPUs": ("NVIDIA H100 80GB HBM3, 81559, 4\nNVIDIA H100 80GB HBM3, 81559, 61440\n", [81559, 81559], [4, 61440]),
    "a comma in the name": ("Quadro RTX 6000, passive, 24220, 0\n", [24220], [0]),
    "numbers that it does not know": ("NVIDIA GB10, [N/A], [N/A]\n", [None], [None]),
    "none": ("\n", [], []),
}


@pytest.mark.parametrize(("text", "total", "used"), RECORDED.values(), ids=RECORDED)
def test_recorded_lists_of_gpus_are_read(text: str, total: list[int | None], used: list[int | None]) -> None:
    gpus = parse_gpus(text)
    assert [gpu["total"] and gpu["total"] // 2**20 for gpu in gpus] == total
    assert [None if gpu["used"] is None else gpu["used"] // 2**20 for gpu in gpus] == used


def test_it_runs_on_old_pythons_and_imports_nothing_of_ours() -> None:
    tree = ast.parse(Path(probe.__file__).read_text(), feature_version=(3, 8))
    imported = {
        name.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    imported |= {str(node.module).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= set(sys.stdlib_module_names)
    assert node_connection.ANSWER_SECONDS > probe._GPU_SECONDS


def test_tokens_are_read_by_others_and_deleted_at_the_end(tmp_path: Path) -> None:
    path, missing = str(tmp_path / "token"), str(tmp_path / "missing")
    first = Probe()
    assert first.write_token(path, "secret") is None
    assert first.write_token(path, "again") == "File exists"
    assert Probe().read_tokens([path, missing], patience=0.0) == ["secret", None]
    first.close()
    assert not list(tmp_path.iterdir())


def test_a_port_that_is_taken_is_answered_with_its_owner_and_another_port() -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        found = Probe().listen(port, "token", ["127.0.0.1"])
    assert found["wanted"] == port != found["port"] and f"process {os.getpid()} " in found["owner"]
    (answered,) = Probe().connect([["127.0.0.1", found["port"]]])
    assert answered["token"] == "token" and answered["own"] == "127.0.0.1" and answered["interface"] == "lo"
    assert "Connection refused" in Probe().connect([["127.0.0.1", port]])[0]["error"]


def test_a_probe_listens_only_at_the_given_addresses() -> None:
    """Catches a probe that listens on every network of a node."""
    before = set(listeners())
    found = Probe().listen(0, "token", ["127.0.0.1", "127.0.0.2", "192.0.2.1"])  # the last is not this machine's
    port = found["port"]
    assert set(listeners()) - before == {("127.0.0.1", port), ("127.0.0.2", port)}
    assert [answer.get("token") for answer in Probe().connect([["127.0.0.2", port], ["127.0.0.3", port]])] == [
        "token",
        None,
    ]


def test_a_disk_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert existing_parent(str(tmp_path / "run" / "logs")) == str(tmp_path)
    disk = Probe().disk(str(tmp_path / "run"))
    assert 0 < disk["free"] <= disk["total"]


def test_files_differ_by_number_name_and_size(tmp_path: Path) -> None:
    def digest() -> list:
        ((number, found),) = Probe().files([str(tmp_path / "*.tar")])
        return [number, found]

    empty = digest()
    (tmp_path / "a.tar").write_text("x")
    one = digest()
    (tmp_path / "a.tar").write_text("xy")
    longer = digest()
    assert [empty[0], one[0], longer[0]] == [0, 1, 1] and len({empty[1], one[1], longer[1]}) == 3
