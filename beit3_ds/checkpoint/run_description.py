"""Describes the run that wrote a checkpoint, and checks whether another run may resume from the checkpoint."""

import dataclasses
import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from beit3_ds.checkpoint.disk import file_sha256
from beit3_ds.config import FIELDS_WITHOUT_TENSORS, ConfigError, ModelConfig, RunConfig
from beit3_ds.printing import printable

_LONGEST_LINE = 500
_LIBRARIES = ("beit3_ds", "torch", "deepspeed", "safetensors")


@dataclass(frozen=True, kw_only=True)
class RunDescription:
    """Description of a run as plain data, stored in the index of each checkpoint."""

    model: Mapping[str, Any]
    """Fields of the model's configuration."""
    config: Mapping[str, Any]
    """All sections of the run's configuration."""
    tokenizers: Mapping[str, str]
    """SHA-256 digest of each tokenizer file that the run uses, under the keys "text" and "visual"."""
    layout: str
    """Layout of the ranks in words, such as "2 data-parallel x 1 tensor-parallel ranks"."""
    versions: Mapping[str, str]
    """Versions of Python and of the libraries that wrote the checkpoint, by name."""

    @property
    def task_name(self) -> str:
        """Returns the name of the task; "pretraining" for checkpoints of version 0.1, which store no task."""
        return str(self.config.get("task", {}).get("name", "pretraining"))

    def check_resumes(self, before: "RunDescription", where: str) -> list[str]:
        """Checks that this run may resume from a checkpoint of the run `before`.

        Args:
            before: description of the run that wrote the checkpoint.
            where: path of the checkpoint, for messages.

        Returns:
            One line per setting that differs between the two runs. There are no lines for the output folder and the
            settings in `parallel`.

        Raises:
            ConfigError: if the checkpoint's run has another task, another model or other tokenizers.
        """
        ours, theirs = (run.config.get("task", {}).get("name") for run in (self, before))
        if theirs is not None and theirs != ours:
            raise ConfigError(
                f"checkpoint {where} belongs to the task {theirs}, but the task of this run is {ours}. Use another "
                f"training.output_dir. To start from these weights, write them with `beit3 export {where} "
                "OUT.safetensors --no-heads`, and name that file in training.init_from."
            )
        advice = "Set the model section as it was, or use another training.output_dir."
        check_same_model(self.model, before.model, f"checkpoint {where}", advice)
        for kind, digest in self.tokenizers.items():
            if before.tokenizers.get(kind, digest) != digest:  # a run without images may resume with images
                raise ConfigError(
                    f"checkpoint {where} was trained with another {kind} tokenizer than tokenizers.{kind}.path (their "
                    f"contents differ), so its ids mean something else. Put that file back, or use another "
                    "training.output_dir."
                )
        old, new = dict(flatten(before.config)), dict(flatten(self.config))
        keys = [key for key in {**old, **new} if not key.startswith(("parallel.", "training.output_dir"))]
        return [
            printable(f"{key}: {json.dumps(old.get(key))} -> {json.dumps(new.get(key))}", _LONGEST_LINE)
            for key in keys
            if old.get(key) != new.get(key)
        ]


def check_same_model(model: Mapping[str, Any], stored: Mapping[str, Any], where: str, advice: str) -> None:
    """Checks that saved weights come from a model with the same tensors as the run's model.

    Args:
        model: fields of the run's model.
        stored: fields of the saved model.
        where: name of the saved weights, for the message.
        advice: last sentence of the message, which tells the user what to do.

    Raises:
        ConfigError: if the models have different tensors; the message names the fields that differ.
    """
    fields = dataclasses.fields(ModelConfig)
    defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    stored = defaults | dict(stored)  # older versions lack some fields
    model, stored = (json.loads(json.dumps(dict(values))) for values in (model, stored))  # lists, not tuples
    changed = [
        f"{key} {json.dumps(stored.get(key))} there, {json.dumps(value)} here"
        for key, value in model.items()
        if key not in FIELDS_WITHOUT_TENSORS and stored.get(key) != value
    ]
    if changed:
        raise ConfigError(f"{where} holds another model: {'; '.join(changed)}. {advice}")


def build_run_description(
    config: RunConfig, layout: str, task: Mapping[str, Any], model: Mapping[str, Any], tokenizers: Mapping[str, str]
) -> RunDescription:
    """Builds the description of a run; reads the tokenizers' files to compute their digests.

    Args:
        config: configuration of the run.
        layout: layout of the ranks in words (`Mesh.describe_layout`).
        task: name and settings of the run's task (`Task.describe`).
        model: settings of the model (`Task.describe_model`), which are equal in all checkpoints of the run.
        tokenizers: paths of the tokenizers that the run uses, under the keys "text" and "visual".
    """
    # Converted through JSON, so that it equals the description read from a checkpoint: tuples become lists.
    sections = dataclasses.asdict(config) | {"task": task, "model": model}
    del sections["backbone"]
    plain = json.loads(json.dumps(sections, default=dict))
    return RunDescription(
        model=plain.pop("model"),
        config=plain,
        tokenizers={kind: file_sha256(Path(path)) for kind, path in tokenizers.items()},
        layout=layout,
        versions={"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
    )


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (path, value) for each leaf of nested mappings; a path is all keys joined by dots."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
