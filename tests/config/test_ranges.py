"""Tests the fields of a run's own section: every number has a range, no path is empty, and paths may begin with `~`."""

import dataclasses
import itertools
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beit3_ds.config import ConfigError, ModelConfig, RunConfig, build_run_config
from beit3_ds.config.numbers import Range
from beit3_ds.config.strict import FilePath, load_section
from tests.run_config import quickstart_mapping

SECTIONS = get_type_hints(RunConfig) | {"model": ModelConfig}


def fields(cls: type, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Yields the path and annotation of every leaf field; a list is represented by its first item."""
    for name, hint in get_type_hints(cls, include_extras=True).items():
        if get_origin(hint) is not None and "ClassVar" in str(hint):
            continue
        yield from _leaves(hint, (*path, name))


def _leaves(hint: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    if dataclasses.is_dataclass(hint):
        yield from fields(hint, path)  # type: ignore[arg-type]
    elif get_origin(hint) in (Union, types.UnionType):
        yield from _leaves(next(arg for arg in get_args(hint) if arg is not type(None)), path)
    elif get_origin(hint) is tuple:
        yield from _leaves(get_args(hint)[0], (*path, 0))
    else:
        yield path, hint


ALL_FIELDS = [
    item
    for section in ("model", "data", "tokenizers", "training", "parallel")
    for item in fields(SECTIONS[section], (section,))
]


def base(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def mark(hint: Any, kind: type) -> Any:
    return next((mark for mark in get_args(hint)[1:] if isinstance(mark, kind)), None)


NUMBERS = [(path, hint) for path, hint in ALL_FIELDS if base(hint) in (int, float)]
PATHS = [(path, hint) for path, hint in ALL_FIELDS if mark(hint, FilePath)]


def name(path: tuple[str | int, ...]) -> str:
    return "beit3_ds." + ".".join(map(str, path)).replace(".0", "[0]")


def with_value(path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """Returns the quickstart configuration with one value replaced."""
    mapping = quickstart_mapping()
    section: Any = mapping["beit3_ds"]
    for step, following in itertools.pairwise(path):
        if isinstance(section, dict):
            known = {"adam_betas": [0.9, 0.98], "global_blocks": [0]}.get(str(step))
            section.setdefault(step, known or ([] if following == 0 else {}))
        if isinstance(section[step], list) and following == 0 and path[-1] != 0:
            section[step] = [{"path": "a.tar"}]
        section = section[step]
    section[path[-1]] = value
    return mapping


def refusal(path: tuple[str | int, ...], value: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build_run_config(with_value(path, value))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_kind_of_field_is_known() -> None:
    """Catches a field of an unknown type, which the tests below would skip."""
    for path, hint in ALL_FIELDS:
        assert base(hint) in (int, float, bool, str) or get_origin(hint) is Literal, f"{name(path)}: {hint}"
    plain = {path[-1] for path, hint in ALL_FIELDS if base(hint) is str and not mark(hint, FilePath)}
    assert plain == {0, "format", "split", "best_metric"}, (
        "a string is a path, one of a few words, or looked at by its section"
    )
    assert len(NUMBERS) > 60


@pytest.mark.parametrize(("path", "hint"), NUMBERS, ids=[name(path) for path, _ in NUMBERS])
def test_every_number_has_a_range_that_is_enforced(path: tuple[str | int, ...], hint: Any) -> None:
    """Catches a number without a range, and a range that is not enforced."""
    allowed: Range = mark(hint, Range)
    assert allowed is not None, f"{name(path)}: declare it as Annotated[{base(hint).__name__}, Range(...)]"
    outside = [float("nan"), float("inf"), -float("inf"), 10**400, -(10**400)]
    outside += [allowed.low if allowed.above else allowed.low - 1, allowed.high if allowed.below else allowed.high * 2]
    for value in outside:
        assert name(path) in refusal(path, value)
    for value in (True, False, "auto", "1", [1], {}):
        assert name(path) in refusal(path, value)


@pytest.mark.parametrize(("path", "hint"), PATHS, ids=[name(path) for path, _ in PATHS])
def test_paths_are_not_empty_and_know_the_home_folder(
    path: tuple[str | int, ...], hint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert f"{name(path)} is empty" in refusal(path, "")
    assert "unknown user" in refusal(path, "~no-such-user/x")
    if path[-1] in ("images", "annotations"):
        return  # goes with some formats alone
    found: Any = build_run_config(with_value(path, "~/$NAME/x"))
    for step in path:
        found = found[step] if isinstance(step, int) else getattr(found, step)
    assert found == "/home/someone/$NAME/x"  # $NAME is the shell's business


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_every_seed_in_range_suits_all_that_draw(seed: int) -> None:
    """Catches seeds such as -1 and 2**64, on which a random generator fails with a traceback."""
    import numpy as np
    import torch

    from beit3_ds.data.randomness import sample_rng
    from beit3_ds.model.initialization import parameter_generator

    assert build_run_config(with_value(("training", "seed"), seed)).training.seed == seed
    torch.manual_seed(seed)
    parameter_generator(seed, "name")
    assert np.isfinite(sample_rng(seed, "order", 1).random())


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Numbers:
    value: Annotated[float, Range(-2, 5, below=True)]


@given(st.floats() | st.integers())
def test_a_range_takes_what_is_inside_and_nothing_else(value: float) -> None:
    try:
        assert load_section(_Numbers, {"value": value}, "here").value == value
    except (ConfigError, OverflowError):
        assert not -2 <= value < 5
    else:
        assert -2 <= value < 5


def test_a_shorter_training_names_the_way_out() -> None:
    assert "add --set training.warmup_steps=3" in refusal(("training", "total_steps"), 39)


def test_monitors_write_below_the_runs_folder() -> None:
    """Catches a monitor whose own path lets it write into the output folder of another run."""
    mapping = quickstart_mapping()
    mapping["tensorboard"] = {"enabled": True, "output_path": "figures", "job_name": "mine"}
    mapping["csv_monitor"] = {"enabled": True, "output_path": "figures"}
    mapping["beit3_ds"]["training"]["output_dir"] = "runs/other"
    engine = build_run_config(mapping).engine_config(1)
    assert engine["csv_monitor"] == {"enabled": True, "output_path": "runs/other/figures", "job_name": "csv"}
    assert engine["tensorboard"] == {"enabled": True, "output_path": "runs/other/figures", "job_name": "mine"}
    mapping["csv_monitor"] = {"enabled": True}
    assert build_run_config(mapping).engine_config(1)["csv_monitor"]["output_path"] == "runs/other/logs"
    for outside in ("/tmp/logs", "~/logs", "a/../../logs"):
        mapping["csv_monitor"] = {"enabled": True, "output_path": outside}
        with pytest.raises(
            ConfigError, match=r"csv_monitor\.output_path: expected a folder inside training.output_dir"
        ):
            build_run_config(mapping)


@pytest.mark.parametrize(
    "key", ["csv_monitor.job_name", "csv_monitor.output_path", "tensorboard.job_name", "wandb.team"]
)
@pytest.mark.parametrize("name", ["a\0b", "a\nb", "\ud800", "n" * 256, "\u00e4" * 128])
def test_names_that_no_file_can_have_are_refused(key: str, name: str) -> None:
    """Catches names that `beit3 check` accepts although the monitor cannot create a file of that name."""
    mapping = quickstart_mapping()
    section, last = key.split(".")
    mapping[section] = {last: name}
    with pytest.raises(ConfigError, match=rf"^{key}: expected [^\n]* got str [^\n]*$"):
        build_run_config(mapping)
    mapping[section] = {last: "n" * 255}
    build_run_config(mapping)


def test_integers_beyond_64_bits_are_named_as_such() -> None:
    """Catches the false message "2**63 must be at least 0"."""
    mapping = quickstart_mapping()
    mapping["beit3_ds"]["training"]["seed"] = 2**63
    with pytest.raises(ConfigError, match=r"training\.seed is 9223372036854775808, which no computer integer holds"):
        build_run_config(mapping)
    mapping["beit3_ds"]["training"]["seed"] = 2**63 - 1
    build_run_config(mapping)
