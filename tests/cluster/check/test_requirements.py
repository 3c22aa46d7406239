"""Tests that the requirements of a run on its nodes follow from the configuration."""

from beit3_ds.cluster.check.requirements import compute_requirements, find_required_files
from beit3_ds.cluster.hostfile import parse_hostfile
from beit3_ds.config import load_run_config


def test_requirements_follow_from_the_config_and_the_hostfile() -> None:
    config = load_run_config("ds_configs/demo_tp2_pp2_dp2_zero3.json")
    requirements = compute_requirements(config, parse_hostfile("a slots=4\nb slots=4\n", "hosts"))
    assert requirements.layout_fault is None and not requirements.faults() and len(requirements.rank_bytes) == 8
    # Ranks 0 to 3 hold the first stage.
    assert (
        len(set(requirements.rank_bytes[:4]))
        == len(set(requirements.rank_bytes[4:]))
        == 1
        < len(set(requirements.rank_bytes))
    )
    files = find_required_files(config)
    assert files["beit3_ds/sample_data/images-train.tar"] and not files[config.tokenizers.text.path]
    alone = compute_requirements(config, parse_hostfile("a slots=3\n", "hosts"))
    assert len(alone.faults()) == 1 and "does not divide world_size=3" in str(alone.faults()[0])
