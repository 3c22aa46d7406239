"""Tests that Triton finds kernels in a cache that was moved."""

from pathlib import Path

import pytest

from beit3_ds.benchmarks.moved_cache import relocate

triton = pytest.importorskip("triton")


def test_triton_finds_the_kernels_of_a_moved_cache(tmp_path: Path) -> None:
    """Catches a bundle whose kernels are all compiled again on the GPU machine, because its cache has another path."""
    from triton.runtime.cache import get_cache_manager

    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path / "here")
        here = get_cache_manager("ab" * 32)
        path = here.put(b"machine code", "kernel.cubin")
        here.put_group("kernel.json", {"kernel.cubin": path})
        (tmp_path / "here").rename(tmp_path / "there")
        triton.knobs.cache.dir = str(tmp_path / "there")
        there = get_cache_manager("ab" * 32)
        assert not there.get_group("kernel.json")  # otherwise Triton moves caches itself
        assert relocate(tmp_path / "there") == 1
        found = there.get_group("kernel.json")
        assert Path(found["kernel.cubin"]).read_bytes() == b"machine code"
        assert str(tmp_path / "there") in found["kernel.cubin"]
