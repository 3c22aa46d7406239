"""Tests how many steps are prepared ahead without exceeding a limit of shared memory."""

from typing import Any

import pytest

from beit3_ds.config import ConfigError, build_run_config
from beit3_ds.config.prefetch import PrefetchPlan, image_bytes, plan_prefetch, step_bytes
from tests.run_config import quickstart_mapping

GIB = 1 << 30


def plan(ranks: int = 1, **data: Any) -> PrefetchPlan:
    mapping = quickstart_mapping()
    mapping["beit3_ds"]["data"] |= data
    return plan_prefetch(build_run_config(mapping), ranks)


def test_all_steps_fit() -> None:
    found = plan(num_workers=3, prefetch_steps=4)
    assert (found.num_workers, found.steps_per_worker) == (3, 4)
    assert found.num_bytes == 12 * found.step_bytes


@pytest.mark.parametrize("num_fitting", [1, 2, 3, 7, 11, 12, 100])
def test_the_bound_holds(num_fitting: int) -> None:
    step = plan(num_workers=3).step_bytes
    found = plan(num_workers=3, prefetch_steps=4, prefetch_gib=max((num_fitting + 0.5) * step / GIB, 0.001))
    # catches a bound per worker, and workers that are kept though not even one step of each fits
    assert found.num_bytes <= max((num_fitting + 0.5) * step, 0.001 * GIB)
    assert 1 <= found.num_workers <= 3


def test_a_step_that_does_not_fit_is_refused_with_its_size() -> None:
    with pytest.raises(
        ConfigError, match=r"prefetch_gib=0\.001 is too small for a step of one rank, which takes 0\.0\d GiB"
    ):
        plan(num_workers=1, prefetch_gib=0.001, images={"train": ["x.tar"], "samples_per_step": 200})


def test_without_workers_nothing_is_shared() -> None:
    assert plan(num_workers=0, prefetch_gib=0.001).num_bytes == 0


def test_bytes_are_those_of_the_pixels_that_are_kept() -> None:
    config = build_run_config(quickstart_mapping())
    assert image_bytes(config, "model") == image_bytes(config, "tokenizer") == 3 * 64**2
    images = 24 + 16
    assert 1 < step_bytes(config, 1) / (images * image_bytes(config)) < 1.3  # pixels are most of a step
    assert step_bytes(config, 2) < 0.52 * step_bytes(config, 1)  # catches the step of all ranks
    assert step_bytes(config, 1, "model") < 0.6 * step_bytes(config, 1)
