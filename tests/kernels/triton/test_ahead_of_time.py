"""Tests that kernels, compiled for GPUs that need not be present, keep their stored budgets."""

import pytest
import triton

from beit3_ds.kernels.triton.ahead_of_time import (
    ARCHITECTURES,
    BUDGETS,
    Report,
    all_variants,
    compile_variant,
    find_excess,
    read_budgets,
    write_budgets,
)

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
    budget = read_budgets().get((variant.name, architecture))
    assert find_excess(compile_variant(variant, architecture), budget, architecture) == []


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "architecture"), cases(is_common=False))
def test_other_variants_keep_their_budgets(variant, architecture) -> None:  # type: ignore[no-untyped-def]
    test_common_variants_keep_their_budgets(variant, architecture)


def test_budgets_belong_to_the_variants() -> None:
    """Catches budgets of variants that no longer exist, and of another version of Triton."""
    variants = {
        (variant.name, architecture) for architecture in ARCHITECTURES for variant in all_variants(architecture)
    }
    assert set(read_budgets()) == variants
    assert f'"triton": "{triton.__version__}"' in BUDGETS.read_text(encoding="utf-8"), "run ahead_of_time --write"


@pytest.mark.parametrize("key", sorted(read_budgets()), ids=str)
def test_budgets_are_lean(key: tuple[str, int]) -> None:
    """Catches budgets that `--write` must not store: spills, synchronous loads, half precision without tensor cores.

    Row-streaming kernels access rows 128 bits at a time, and narrower only a few numbers per row. A tensor of rows that
    is not vectorised would need 16 narrow accesses or more.
    """
    budget = read_budgets()[key]
    assert (budget.stack, budget.spills) == (0, 0)
    if key[0] in MEMORY_BOUND:
        assert budget.tensor_core == 0
        if "combine_statistics" in key[0]:  # it reads a few numbers a row, and no rows
            return
        assert budget.wide_accesses > 0
        assert budget.narrow_accesses <= 11
        return
    assert budget.async_copies > 0
    products_in_fp32 = "fp32" in key[0].replace("fp32 stream", "")  # a wider residual stream leaves products in bf16
    assert (budget.tensor_core > 0) == (not products_in_fp32)


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
    monkeypatch.setattr("beit3_ds.kernels.triton.ahead_of_time.BUDGETS", tmp_path / "budgets.json")
    assert read_budgets() == {}
    reports = {("one", 80): LEAN, ("one", 90): LEAN._replace(stack=4), ("two", 80): LEAN}
    write_budgets(reports)
    assert read_budgets() == reports
