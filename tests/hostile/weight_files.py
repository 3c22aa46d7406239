"""Reads hostile weights and checkpoints like all commands other than `beit3 inspect`."""

import random
from collections.abc import Callable
from pathlib import Path

from beit3_ds.checkpoint.collection import CheckpointCollection
from beit3_ds.checkpoint.loading import agree_on_newest
from beit3_ds.config import RunConfig
from beit3_ds.inference.loading import load_backbone
from beit3_ds.model.adaptation import AdaptedWeights
from beit3_ds.parallel import Mesh
from beit3_ds.parallel.host_group import HostGroup
from beit3_ds.tokenizers.released import import_released_tokenizer
from beit3_ds.training.init_from import InitialWeights
from beit3_ds.weights.export import export_weights
from beit3_ds.weights.reader import open_for_import, open_weights
from tests.hostile.corpus import HostileKind, check_message
from tests.weights.hostile_files import Originals, write_hostile


def weight_kinds(originals: Originals, config: RunConfig) -> dict[str, HostileKind]:
    """Returns one kind per reader; all readers get the same files."""

    def export(path: Path) -> None:
        for number, weight_format in enumerate(("beit3", "unilm-dual", "timm")):
            export_weights(open_weights(path), path.parent / f"out{number}", format=weight_format)  # type: ignore[arg-type]

    def evaluate(path: Path) -> None:
        stored = open_weights(path)
        AdaptedWeights(stored, config.model, "--weights", seed=1).check(
            {name: stored.shape(name) for name in stored.names()}
        )

    def resume(path: Path) -> None:
        folder = agree_on_newest(CheckpointCollection(path.parent, keep=1), Mesh(), HostGroup())
        if folder is not None:
            check_message(str(folder.index.best_step), "best step")
            for line in folder.index.run.check_resumes(folder.index.run, str(folder.path)):
                check_message(line, "line of a resumed run")
            for name in folder.names():
                folder.read(name)

    readers: dict[str, Callable[[Path], object]] = {
        "weights: export": export,
        "weights: import": lambda path: export_weights(open_for_import(path), path.parent / "out.safetensors"),
        "weights: import a tokenizer": lambda path: import_released_tokenizer(path, path.parent / "tokenizer"),
        "weights: init_from": lambda path: InitialWeights(path, config),
        "weights: evaluate": evaluate,
        "weights: predict": lambda path: load_backbone(path, ("images", "texts")),
        "checkpoint: resume": resume,
    }

    def write(folder: Path, draw: random.Random) -> Path:
        return write_hostile(originals, folder, draw.randrange(10**6))

    def write_checkpoint(folder: Path, draw: random.Random) -> Path:
        number = draw.randrange(10**5) * 9 + draw.randrange(4)  # the kinds that change a checkpoint
        return write_hostile(originals, folder, number)

    return {
        name: HostileKind(write_checkpoint if name.startswith("checkpoint") else write, read)
        for name, read in readers.items()
    }
