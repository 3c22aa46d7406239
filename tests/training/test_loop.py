"""How a run starts from its newest checkpoint."""

from pathlib import Path
from typing import Any

from tests.test_pretrain import finish, write


def test_total_steps_below_the_checkpoint_are_refused(run_mapping: dict[str, Any], tmp_path: Path) -> None:
    training = run_mapping["beit3_ds"]["training"]
    training |= {"total_steps": 2, "eval_interval": 100, "save_interval": 100}
    status, output = finish(write(run_mapping, tmp_path))
    assert status == 0, output

    status, output = finish(write(run_mapping, tmp_path))
    assert status == 0, output
    # catches a run that trains nothing and does not say why
    assert "nothing is left to train: the checkpoint holds all training.total_steps=2 steps" in output

    training["total_steps"] = 1
    status, output = finish(write(run_mapping, tmp_path))
    assert status == 2, output
    # catches status 0 with neither a step nor a word
    assert "training.total_steps=1 is below the 2 steps that checkpoint" in output
    assert "Traceback" not in output
