"""Tests that the table of DeepSpeed's keys is complete, and that it checks the type and range of each value."""

from collections.abc import Iterator
from typing import Any

import pytest

from beit3_ds.config import ConfigError, RunConfig, build_run_config
from beit3_ds.config.deepspeed_keys import DEEPSPEED_KEYS, AcceptedKey, accepted_keys
from beit3_ds.config.key_specs import Choice, Fixed, Flag, Number, Refused, Section, Spec, Text
from tests.run_config import small_run_mapping

ACCEPTED = list(accepted_keys())

NO_VALUE_OF_A_KEY = [None, "auto", "true", "on", [], {}, [1], float("nan"), float("inf"), -1, -1.5, 10**30, "", "1"]
"""Values that are invalid for every key of DeepSpeed that takes a number, flag or choice."""


def with_key(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """Returns a small run with one key of DeepSpeed set."""
    mapping = small_run_mapping(1)
    section = mapping
    for name in path[:-1]:
        section = section.setdefault(name, {})
    section[path[-1]] = value
    return mapping


def refusal(mapping: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        build_run_config(mapping)
    return str(caught.value)


def specs(keys: Any = DEEPSPEED_KEYS, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, spec in keys.items():
        yield (*path, name), spec
        if isinstance(spec, Section):
            yield from specs(spec.keys, (*path, name))


def test_top_level_keys_are_those_of_the_pinned_version() -> None:
    """Catches top-level keys that a new version of DeepSpeed adds or drops, by recording what its parser reads."""
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfig

    asked: set[str] = set()

    class Watched(dict):
        def get(self, key, default=None):  # type: ignore[no-untyped-def]
            asked.add(key)
            return super().get(key, default)

        def __contains__(self, key: object) -> bool:
            asked.add(str(key))
            return super().__contains__(key)

        def __getitem__(self, key: str) -> object:
            asked.add(key)
            return super().__getitem__(key)

        def keys(self):  # type: ignore[no-untyped-def]
            return Watched(self)

        def copy(self):  # type: ignore[no-untyped-def]
            return self

    DeepSpeedConfig(Watched(train_batch_size=1))
    # Read elsewhere than in the parser, or only beside another key.
    elsewhere = {"timers", "compile", "tensor_parallel", "bfloat16"} | _REMOVED_TOP_LEVEL_CONFIG_KEYS.keys()
    assert asked - DEEPSPEED_KEYS.keys() == set()
    assert DEEPSPEED_KEYS.keys() - asked - elsewhere == set()


def test_nested_keys_are_those_of_the_pinned_version() -> None:
    """Catches keys of a section that a new version of DeepSpeed adds, drops or renames."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime import constants
    from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    models: dict[tuple[str, ...], Any] = {
        ("zero_optimization",): DeepSpeedZeroConfig,
        ("zero_optimization", "offload_param"): DeepSpeedZeroOffloadParamConfig,
        ("zero_optimization", "offload_optimizer"): DeepSpeedZeroOffloadOptimizerConfig,
        ("bf16",): DeepSpeedBF16Config,
        ("csv_monitor",): CSVConfig,
        ("tensorboard",): TensorBoardConfig,
        ("wandb",): WandbConfig,
        ("comms_logger",): CommsLoggerConfig,
        ("timers", "throughput"): DeepSpeedThroughputTimerConfig,
    }
    known = {
        path: {*model.model_fields, *(field.alias for field in model.model_fields.values() if field.alias)}
        for path, model in models.items()
    }
    known["zero_optimization",] |= _REMOVED_ZERO_CONFIG_KEYS.keys()
    known["timers",] = {"throughput"}
    names = ("GRAD_ACCUM_DTYPE", "PARAM_DTYPE", "BUFFER_DTYPE", "KEEP_IN_FP32_MODULES")
    known["data_types",] = {getattr(constants, name) for name in names}
    found = {path: set(spec.keys) for path, spec in specs() if isinstance(spec, Section)}
    assert found == known


def test_fixed_values_are_what_deepspeed_does_without_the_key() -> None:
    """Catches a fixed value that differs from DeepSpeed's default and would therefore change the run."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

    fixed = {path: spec.value for path, spec in specs() if isinstance(spec, Fixed)}
    whole = DeepSpeedConfig({"train_batch_size": 1})
    sections = {
        (): {name: getattr(whole, name, None) for name in DEEPSPEED_KEYS},
        ("zero_optimization",): DeepSpeedZeroConfig().model_dump(by_alias=True),
        ("zero_optimization", "offload_optimizer"): DeepSpeedZeroOffloadOptimizerConfig().model_dump(),
        ("bf16",): DeepSpeedBF16Config().model_dump(),
    }
    fixed.pop(("zero_force_ds_cpu_optimizer",))  # which the engine's configuration sets where it matters
    assert fixed == {path: sections[path[:-1]][path[-1]] for path in fixed}


@pytest.mark.parametrize("key", ACCEPTED, ids=lambda key: key.name)
def test_values_of_other_types_and_ranges_are_refused_by_name(key: AcceptedKey) -> None:
    """Catches a key whose value is not checked; a wrong value must give one line that names the key."""
    for value in NO_VALUE_OF_A_KEY:
        if isinstance(key.spec, Text) and isinstance(value, str) and value not in ("", "auto"):
            continue
        message = refusal(with_key(key.path, value))
        assert key.name in message, message
        assert "\n" not in message
        if value == "auto":
            assert "leave the key out" in message


@pytest.mark.parametrize("key", ACCEPTED, ids=lambda key: key.name)
def test_deepspeed_takes_every_accepted_value(key: AcceptedKey) -> None:
    """Catches a value that the table accepts and DeepSpeed's parser refuses."""
    from deepspeed.runtime.config import DeepSpeedConfig

    samples = {"train_batch_size": (12,), "train_micro_batch_size_per_gpu": (12,)}.get(key.name, key.spec.samples)
    for value in samples or ("name",):
        config = accepted(key, value)
        DeepSpeedConfig({**config.engine_config(1), "train_batch_size": config.samples_per_step})


def accepted(key: AcceptedKey, value: Any) -> RunConfig:
    """Returns a run with this value and with the other keys that the value requires."""
    mapping = with_key(key.path, value)
    if key.path[0] == "zero_optimization" and key.path[1:] != ("stage",):
        mapping["zero_optimization"]["stage"] = key.spec.stages[-1]
    if value == "bf16":
        mapping["bf16"] = {"enabled": True}
    return build_run_config(mapping)


@pytest.mark.parametrize(("path", "spec"), [(path, spec) for path, spec in specs() if isinstance(spec, Refused)])
def test_what_is_not_supported_is_refused_with_the_reason(path: tuple[str, ...], spec: Refused) -> None:
    for value in (True, 1, {}, "auto"):
        assert refusal(with_key(path, value)) == f"{'.'.join(path)} is not supported: {spec.reason}"


@pytest.mark.parametrize(("path", "spec"), [(path, spec) for path, spec in specs() if isinstance(spec, Fixed)])
def test_only_the_fixed_value_may_be_written(path: tuple[str, ...], spec: Fixed) -> None:
    others = [not spec.value] if isinstance(spec.value, bool) else [2, "auto", None, True]
    for value in others:
        message = refusal(with_key(path, value))
        assert ".".join(path) in message and spec.reason in message
    build_run_config(with_key(path, spec.value))


@pytest.mark.parametrize(("path", "spec"), [(path, spec) for path, spec in specs() if isinstance(spec, Section)])
def test_sections_are_objects_of_known_keys(path: tuple[str, ...], spec: Section) -> None:
    """Catches section values on which DeepSpeed fails or guesses.

    For example, DeepSpeed reads `zero_optimization: true` as stage 1.
    """
    for value in (True, False, None, 1, "auto", [], [{}]):
        message = refusal(with_key(path, value))
        assert message.startswith(f"{'.'.join(path)}: expected a JSON object such as {spec.example}")
    name = next(iter(spec.keys))
    assert f"{'.'.join(path)}: unknown key '{name}x'. Did you mean" in refusal(with_key((*path, f"{name}x"), 1))


def test_every_kind_of_number_has_a_range_and_samples_in_it() -> None:
    for key in ACCEPTED:
        assert isinstance(key.spec, Flag | Number | Choice | Text)
        for value in key.spec.samples:
            assert key.spec.read(value, "") == value
        assert isinstance(key.spec, Text) or key.spec.samples or key.path[0].startswith("train_")
        assert key.spec.effect and key.spec.effect[-1] == "."


def test_integers_may_be_written_as_deepspeed_documents_them() -> None:
    config = build_run_config(with_key(("zero_optimization", "reduce_bucket_size"), 5e8))
    bucket = config.deepspeed["zero_optimization"]["reduce_bucket_size"]
    assert (bucket, type(bucket)) == (500_000_000, int)
    assert "an integer" in refusal(with_key(("zero_optimization", "reduce_bucket_size"), 5.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_types": {"grad_accum_dtype": "bf16"}}, r"round gradients of float32 weights"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, r"needs .*stage 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, r"needs .*stage=3.*it is 2"),
        (
            {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
            r"needs ZeRO",
        ),
    ],
)
def test_keys_that_deepspeed_refuses_together(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_run_config(small_run_mapping(1) | change)


def test_every_spec_is_one_of_the_known_kinds() -> None:
    assert all(isinstance(spec, Spec | Refused | Section) for _, spec in specs())
