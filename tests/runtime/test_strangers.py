"""Tests that a run listens only where its ranks meet and ignores strangers; a single process opens no port."""

import os
import pickle
import re
import secrets
import socket
from pathlib import Path

import pytest

from beit3_ds.config import ConfigError
from beit3_ds.runtime.keyed_store import ForgedValueError, KeyedStore
from beit3_ds.runtime.run_secret import SECRET_FILE, read_secret
from tests.listeners import listeners
from tests.ranks import run_ranks
from tests.runtime.stranger import Bomb


def meet_beside_a_stranger(bomb: str) -> tuple[list[tuple[str, int]], float, str]:
    """Joins a group, sends data to every listening port as a stranger, and then sums over the ranks."""
    import torch
    import torch.distributed as dist

    from beit3_ds.config import ParallelConfig
    from beit3_ds.runtime.process_group import joined_ranks

    with joined_ranks(ParallelConfig(timeout_seconds=60)) as mesh:
        found = listeners()
        for address in found:
            for content in (secrets.token_bytes(4096), pickle.dumps(Bomb(bomb))):
                with socket.create_connection(address) as stranger:
                    stranger.sendall(content)
        refused = ""
        if mesh.is_main:
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
            for key in store.list_keys():
                if "/failure" not in key and "/beat" not in key and "/reported" not in key:
                    store.set(key, pickle.dumps(Bomb(bomb)))  # type: ignore[arg-type]
            assert mesh.store is not None
            mesh.store.set("fact", "the ranks' own")
            assert mesh.store.get("fact") == b"the ranks' own"
            store.set("run/0/fact", pickle.dumps(Bomb(bomb)))  # type: ignore[arg-type]
            try:
                mesh.store.get("fact")
            except ForgedValueError as error:
                refused = str(error)
        mesh.barrier()
        return found, mesh.sum_over_all(torch.ones(3)).sum().item(), refused


def listen_alone() -> list[tuple[str, int]]:
    """Joins a group of one process and sums in it; returns the addresses and ports at which the process listens."""
    import torch
    import torch.distributed as dist

    from beit3_ds.config import ParallelConfig
    from beit3_ds.runtime.process_group import joined_ranks

    with joined_ranks(ParallelConfig(timeout_seconds=60)) as mesh:
        dist.all_reduce(total := torch.ones(2), group=mesh.data_parallel_group)
        assert total.tolist() == [1, 1] and mesh.num_ranks == 1
        return listeners()


def test_a_stranger_changes_nothing(tmp_path: Path) -> None:
    """Catches a store that listens on all interfaces, as torch's store does by default."""
    results = run_ranks(meet_beside_a_stranger, 2, str(tmp_path / "bomb"))
    assert [total for _, total, _ in results] == [6, 6]
    assert {address for found, _, _ in results for address, _ in found} == {"127.0.0.1"}
    assert "no rank of this run wrote" in results[0][2]
    assert not (tmp_path / "bomb").exists()


def test_a_process_alone_opens_no_port() -> None:
    assert run_ranks(listen_alone, 1) == [[]]


def test_values_are_valid_only_under_their_own_key() -> None:
    import torch.distributed as dist

    base = dist.HashStore()
    store, stranger = KeyedStore(base, b"secret"), KeyedStore(base, b"another")
    store.set("a", "value")
    assert store.get("a") == b"value"
    assert store.multi_get(["a"]) == [b"value"]
    base.set("b", base.get("a"))  # type: ignore[arg-type]
    stranger.set("c", "value")
    base.set("d", "")
    for key in "bcd":
        with pytest.raises(ForgedValueError, match=f"a value of '{key}' that no rank"):
            store.get(key)


def test_the_secret_is_for_its_owner(tmp_path: Path) -> None:
    secret = read_secret(None, str(tmp_path / "run"))
    path = tmp_path / "run" / SECRET_FILE
    assert path.stat().st_mode & 0o777 == 0o600 and path.read_bytes() == secret
    assert [entry.name for entry in path.parent.iterdir()] == [SECRET_FILE]  # catches a temporary file that stays
    assert read_secret(None, str(tmp_path / "run")) == secret != read_secret(None, str(tmp_path / "other"))
    assert read_secret(str(path), None) == secret
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=r"has mode 0644.*mode 0600.*BEIT3_SECRET_FILE=FILE"):
        read_secret(str(path), None)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(ConfigError, match="fewer than 16 bytes"):
        read_secret(str(path), None)
    with pytest.raises(ConfigError, match="no common secret"):
        read_secret(None, None)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_secret(str(tmp_path / "missing"), None)


def test_no_pickle_is_between_ranks() -> None:
    """Checks the source for pickle.

    Only code that talks to a rank's own data-loader workers, or refuses untrusted files, may mention it.
    """
    root = Path(__file__).parents[2]
    pattern = re.compile(
        r"^\s*(import|from) (pickle|dill|cloudpickle|marshal)\b|(all_gather|broadcast|gather|scatter|send|recv)_object"
    )
    allowed = {f"beit3_ds/{name}.py" for name in ("untrusted_file", "data/workers/transport", "data/workers/process")}
    files = [path for room in ("beit3_ds", "kernels") for path in (root / room).rglob("*.py")]
    found = {str(path.relative_to(root)) for path in files if any(map(pattern.search, path.read_text().splitlines()))}
    assert found == allowed
