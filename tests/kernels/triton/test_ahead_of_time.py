"""Tests that kernels, compiled for GPUs that need not be present, stay within their stored budgets."""

from pathlib import Path

import pytest
import torch
import triton

from beit3_ds.kernels.triton import budgets as stored_budgets
from beit3_ds.kernels.triton.ahead_of_time import ARCHITECTURES, all_variants, compile_variant, find_excess
from beit3_ds.kernels.triton.budgets import (
    Report,
    read_budgets,
    spilling_variants,
    stored_versions,
    version_key,
    write_budgets,
)
from beit3_ds.kernels.triton.multiway_ffn import up_projection_kernel
from beit3_ds.kernels.triton.multiway_ffn_launch import candidate_tiles, choose_tiles
from beit3_ds.kernels.triton.packed_attention_launch import choose_tiling

LEAN = Report(
    registers=100,
    stack=0,
    spills=0,
    shared_memory=1000,
    tensor_core=8,
    async_copies=4,
    wide_accesses=6,
    narrow_accesses=2,
)
ELEMENTS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MEMORY_BOUND = {
    variant.name for architecture in ARCHITECTURES for variant in all_variants(architecture) if variant.is_memory_bound
}


def cases(is_common: bool) -> list:
    return [
        pytest.param(variant, architecture, id=f"{variant.name} sm_{architecture}")
        for architecture in ARCHITECTURES
        for variant in all_variants(architecture)
        if variant.is_common == is_common
    ]


@pytest.mark.parametrize(("variant", "architecture"), cases(is_common=True))
def test_common_variants_keep_their_budgets(variant, architecture) -> None:  # type: ignore[no-untyped-def]
    budget = read_budgets(triton.__version__).get((variant.name, architecture))
    assert find_excess(compile_variant(variant, architecture), budget, architecture) == []


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "architecture"), cases(is_common=False))
def test_other_variants_keep_their_budgets(variant, architecture) -> None:  # type: ignore[no-untyped-def]
    test_common_variants_keep_their_budgets(variant, architecture)


def test_budgets_belong_to_the_variants() -> None:
    """Catches budgets of variants that do not exist, and a version of Triton without budgets."""
    variants = {
        (variant.name, architecture) for architecture in ARCHITECTURES for variant in all_variants(architecture)
    }
    assert version_key(triton.__version__) in stored_versions(), "run ahead_of_time --write"
    for version in stored_versions():
        assert set(read_budgets(version)) == variants, version


@pytest.mark.parametrize("version", stored_versions())
def test_budgets_are_lean(version: str) -> None:
    """Catches bad budgets, which `--write` must not store: synchronous loads, or half precision without tensor cores.

    Row-streaming kernels access rows 128 bits at a time, and only a few numbers per row at less. A tensor of rows
    without vector access would need at least 16 narrow accesses.
    """
    for key, budget in read_budgets(version).items():
        name, _ = key
        if name in MEMORY_BOUND:
            assert budget.tensor_core == 0, key
            assert budget.wide_accesses > 0, key
            # Triton 3.6 loads the numbers of each row of a block by instructions of their own.
            reads_per_row = version == "3.6" and name.startswith("linear_cross_entropy gradient")
            assert budget.narrow_accesses <= (20 if reads_per_row else 11), key
            continue
        assert budget.async_copies > 0, key
        products_in_fp32 = "fp32" in name.replace("fp32 stream", "")  # a wider stream leaves products in bf16
        assert (budget.tensor_core > 0) == (not products_in_fp32), key


@pytest.mark.parametrize("version", stored_versions())
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_that_spills_is_chosen(version: str, architecture: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches chosen tiles that spill under a version of Triton, and a kernel whose tiles all spill."""
    monkeypatch.setattr(triton, "__version__", version)
    for variant in all_variants(architecture):
        report = read_budgets(version)[variant.name, architecture]
        dtype = ELEMENTS[variant.signature[variant.kernel.arg_names[0]].removeprefix("*")]
        if "TILE" in variant.constants:
            chosen = choose_tiling.__wrapped__(architecture, variant.constants["K"], dtype)
            config = getattr(chosen, variant.kernel.__name__.removesuffix("_kernel"))
            own = (variant.constants["TILE"], variant.constants["BLOCK"], variant.num_warps, variant.num_stages)
            is_chosen = own == (chosen.tile, *config)
        elif variant.name.startswith("multiway_ffn"):
            tiles = choose_tiles.__wrapped__(variant.kernel, architecture, dtype)
            assert tiles, variant.name
            is_chosen = any(variant.name.endswith(f" tile {choice.describe()}") for choice in tiles)
        else:
            is_chosen = True
        assert not is_chosen or (report.stack, report.spills) == (0, 0), variant.name


def test_tiles_that_spill_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches a choice that ignores the budgets of the installed version."""
    monkeypatch.setattr(stored_budgets, "BUDGETS", tmp_path / "budgets.json")
    monkeypatch.setattr(triton, "__version__", "3.7.1")
    candidates = candidate_tiles(up_projection_kernel, 90, torch.bfloat16)
    spilling = f"multiway_ffn up_projection bf16 1408->6144 tile {candidates[0].describe()}"
    for version, spills, left_out in (("3.5", 2, 1), ("3.6", 0, 0), ("3.7", 9, 1), ("3.8", 0, 1)):
        write_budgets(version, {(spilling, 90): LEAN._replace(spills=spills), (spilling, 80): LEAN})
        spilling_variants.cache_clear()
        choose = choose_tiles.__wrapped__
        assert choose(up_projection_kernel, 90, torch.bfloat16) == candidates[left_out:], version
        assert choose(up_projection_kernel, 80, torch.bfloat16) == candidates
        assert choose(up_projection_kernel, 90, torch.float16) == candidates
    spilling_variants.cache_clear()


def test_excess() -> None:
    assert find_excess(LEAN, LEAN, 80) == []
    assert find_excess(LEAN._replace(registers=90, tensor_core=9), LEAN, 80) == []
    assert find_excess(LEAN._replace(registers=101, stack=8, spills=2), LEAN, 80) == [
        "registers 101 > 100",
        "stack 8 > 0",
        "spills 2 > 0",
    ]
    assert find_excess(LEAN._replace(tensor_core=0, async_copies=3, wide_accesses=5, narrow_accesses=8), LEAN, 90) == [
        "narrow_accesses 8 > 2",
        "tensor_core 0 < 8",
        "async_copies 3 < 4",
        "wide_accesses 5 < 6",
    ]
    too_much = LEAN._replace(shared_memory=170 * 1024)
    assert find_excess(too_much, too_much, 90) == []
    assert find_excess(too_much, too_much, 80) == [f"shared memory {170 * 1024} > {163 * 1024} of sm_80"]
    assert find_excess(LEAN, None, 80) == ["no budget: run with --write"]


def test_budgets_survive_storing(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(stored_budgets, "BUDGETS", tmp_path / "budgets.json")
    assert read_budgets("3.10.0") == {}
    reports = {("one", 80): LEAN, ("one", 90): LEAN._replace(stack=4), ("two", 80): LEAN}
    write_budgets("3.10.0", reports)
    write_budgets("3.9.1+git", {("one", 80): LEAN})
    assert read_budgets("3.10.2") == reports and read_budgets("3.9.0") == {("one", 80): LEAN}
    assert stored_versions() == ["3.9", "3.10"]
