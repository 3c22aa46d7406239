"""Tests that checkpoints stay correct under every accepted DeepSpeed option that changes how state is stored."""

from pathlib import Path

import pytest

from beit3_ds.config.deepspeed_keys import accepted_keys
from tests.checkpoint.deepspeed_key_table import DOCUMENT, document
from tests.checkpoint.deepspeed_keys import CHOSEN_BY_CELL, KeyCell, cells_of, check_cells, joint_cells, state_keys
from tests.ranks import run_ranks


def check(cells: list[KeyCell], root: Path) -> None:
    """Checks cells on two ranks, which are started once for all cells."""
    faults = run_ranks(check_cells, 2, cells, root, timeout=1800)
    for cell, *fault in zip(cells, *faults, strict=True):
        assert fault == [None, None], f"{cell}: {next(filter(None, fault))}"


def test_all_keys_of_a_stage_together(tmp_path: Path) -> None:
    """Catches an option that orders flat buffers differently from what checkpoints assume."""
    check(list(joint_cells()), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [key.name for key in state_keys()])
def test_every_key_alone(name: str, tmp_path: Path) -> None:
    """Checks each key alone: all samples, in all its ZeRO stages and both precisions."""
    (key,) = [key for key in state_keys() if key.name == name]
    cells = list(cells_of(key))
    assert cells, "a key without samples is not tested"
    check(cells, tmp_path)


def test_no_key_is_left_out() -> None:
    """Checks that every accepted key that affects stored state has samples and occurs in the joint cells."""
    given = {key for cell in joint_cells() for key, _ in cell.options} | set(CHOSEN_BY_CELL)
    assert {key.name for key in state_keys()} <= given
    for key in state_keys():
        assert key.spec.samples and list(cells_of(key)), key.name
    kept_elsewhere = {key.path[0] for key in accepted_keys()} - {key.path[0] for key in state_keys()}
    assert kept_elsewhere == {
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        *("steps_per_print", "csv_monitor", "tensorboard", "wandb", "comms_logger", "timers", "dump_state"),
        *("memory_breakdown", "wall_clock_breakdown", "log_level"),
    }, "a new section: say here whether it may change how state is kept"


def test_the_document_is_that_of_the_table() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "run python -m tests.checkpoint.deepspeed_key_table"
