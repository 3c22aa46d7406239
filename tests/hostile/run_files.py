"""Generates hostile files of runs: positions in checkpoints, metrics, tokenizers and token files."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from beit3_ds.config import RunConfig
from beit3_ds.data.files.fingerprint import SourceFile
from beit3_ds.data.order.run import POSITIONS, RunOrder
from beit3_ds.data.text.paragraphs import whole_file
from beit3_ds.data.text.sentences import ParagraphCutter
from beit3_ds.data.text.sequence_borders import write_borders
from beit3_ds.data.text.sequences import TextSequences, texts_folder
from beit3_ds.data.text.token_files import write_tokens
from beit3_ds.tokenizers import TextTokenizer, load_visual_tokenizer
from beit3_ds.tokenizers.recipe import _read_recipe, _recipe_path
from beit3_ds.tokenizers.visual import _METADATA_KEY
from beit3_ds.training.broken_records import BROKEN_RECORDS, records_from
from beit3_ds.training.comparison import compare_runs
from beit3_ds.training.metrics_log import MetricsLog
from tests.hostile.corpus import HostileKind, check_message, read_records
from tests.hostile.values import (
    change_header,
    change_json,
    change_note,
    changed_json_text,
    damage_bytes,
    replace_file,
)
from tests.run_config import small_run_config

METRICS = [
    *({"step": step, "kind": "train", "loss": 2.5, "mim": 1.5, "seconds_left": 3.0} for step in (1, 2, 3)),
    {"step": 3, "kind": "validation", "mim": 1.5},
    {"step": 3, "kind": "checkpoint", "seconds": 0.5, "failed": False},
]


class _Samples:
    """Implements a source whose samples have numbers as names."""

    is_last_open = False

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def files(self) -> list[SourceFile]:
        return [SourceFile("s.tar", 10, self.size)]

    def identity(self, index: int) -> bytes:
        return b"%d" % index


def _order(config: RunConfig, size: int) -> RunOrder:
    return RunOrder(config.data, 1, {name: [_Samples(size)] for name in config.data.streams()})


class RunKinds:
    """Holds kinds of hostile files that are derived from trained tokenizers."""

    def __init__(self, tokenizer_files: dict[str, str]) -> None:
        """Opens the tokenizers whose copies will be changed."""
        self.text, self.visual = Path(tokenizer_files["text"]), Path(tokenizer_files["visual"])
        self.tokenizer, self.config = TextTokenizer(self.text), small_run_config(0)
        self.kinds = {
            "position of a checkpoint": HostileKind(self._write_position, self._resume),
            "metrics": HostileKind(self._write_metrics, self._read_metrics),
            "text tokenizer": HostileKind(self._write_text_tokenizer, self._read_text_tokenizer),
            "visual tokenizer": HostileKind(self._write_visual_tokenizer, load_visual_tokenizer),
            "recipe of a tokenizer": HostileKind(self._write_recipe, _read_recipe),
            "token files": HostileKind(self._write_token_files, self._read_token_files),
        }

    def _write_position(self, folder: Path, draw: random.Random) -> Path:
        """Writes the data state of a checkpoint, sometimes of a run whose data changed during an epoch."""
        order = _order(self.config, 30)
        if draw.random() < 0.6:
            order.resume(3, json.loads(json.dumps({POSITIONS: _order(self.config, 20).state_after(3)})), {})
        data: dict[str, Any] = json.loads(json.dumps({POSITIONS: order.state_after(5)}))
        data[BROKEN_RECORDS] = {"a.tar:1": "broken image"}
        part = draw.choice([data, data[POSITIONS], *data[POSITIONS].values()])
        for _ in range(draw.choice([1, 1, 2])):
            change_json(part, draw)
            if draw.random() < 0.5:
                _change_number(part, draw)
        (folder / "data.json").write_text(json.dumps(data))
        return folder / "data.json"

    def _resume(self, path: Path) -> None:
        data = json.loads(path.read_text())
        records_from(data)
        order = _order(self.config, 40)
        for line in order.resume(5, data, {}):
            check_message(line, "line of a resumed run")
        for name in self.config.data.streams():
            for step in (5, 6, 9):
                _, numbers = order.samples(name, step, range(4))
                assert numbers.min() >= 0 and numbers.max() < 40
        order.state_after(7)

    def _write_metrics(self, folder: Path, draw: random.Random) -> Path:
        for name in ("one", "two"):
            (folder / name).mkdir()
            (folder / name / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in METRICS))
        lines = [json.dumps(record).encode() for record in METRICS]
        lines[draw.randrange(len(lines))] = changed_json_text(draw.choice(METRICS), draw)
        path = folder / "one" / "metrics.jsonl"
        path.write_bytes(b"\n".join(lines) + b"\n")
        if draw.random() < 0.3:
            replace_file(path, draw)
        return folder

    def _read_metrics(self, folder: Path) -> None:
        comparison = compare_runs(folder / "one", folder / "two")
        comparison.describe()
        log = MetricsLog(folder / "one" / "metrics.jsonl")
        log.figures()
        log.forget_after(2)

    def _write_text_tokenizer(self, folder: Path, draw: random.Random) -> Path:
        path = Path(shutil.copy(self.text, folder / "text.spm"))
        path.write_bytes(damage_bytes(path.read_bytes(), draw))
        if draw.random() < 0.3:
            replace_file(path, draw)
        return path

    def _read_text_tokenizer(self, path: Path) -> None:
        tokenizer = TextTokenizer(path)
        tokenizer.decode(tokenizer.encode("two dogs. \u96ea"))
        tokenizer.encode_batch(["a dog", ""])
        ParagraphCutter(tokenizer)

    def _write_visual_tokenizer(self, folder: Path, draw: random.Random) -> Path:
        path = Path(shutil.copy(self.visual, folder / "visual.safetensors"))
        match draw.randrange(3):
            case 0:
                change_header(path, draw)
            case 1:
                change_note(path, _METADATA_KEY, draw)
            case _:
                replace_file(path, draw)
        return path

    def _write_recipe(self, folder: Path, draw: random.Random) -> Path:
        path = Path(shutil.copy(self.text, folder / "text.spm"))
        recipe = _recipe_path(path)
        recipe.write_bytes(changed_json_text({"sha256": "0" * 64, "recipe": {"images.train": [{"path": "a"}]}}, draw))
        if draw.random() < 0.4:
            replace_file(recipe, draw)
        return path

    def _write_token_files(self, folder: Path, draw: random.Random) -> Path:
        text = folder / "t.txt"
        text.write_text("two dogs.\n\nthree dogs and a cat.\n" * 20)
        cache = texts_folder(str(folder / "cache"))
        cache.mkdir(parents=True)
        piece = write_tokens(cache, whole_file(str(text)), self.tokenizer, 5)
        write_borders(cache, str(text), [piece], 16, ParagraphCutter(self.tokenizer))
        path = draw.choice([piece.path, *cache.glob("*.borders")])
        data = path.read_bytes()
        length = int.from_bytes(data[-16:-8], "little")
        start = len(data) - 16 - length
        match draw.randrange(4):
            case 0:
                replace_file(path, draw)
            case 1:
                numbers = np.frombuffer(data[: start // 8 * 8], dtype="<i8").copy()
                numbers[draw.randrange(len(numbers))] = draw.choice([-1, 2**62, 0, 10**6])
                path.write_bytes(numbers.tobytes() + data[len(numbers) * 8 :])
            case 2:
                path.write_bytes(damage_bytes(data, draw))
            case _:
                footer = changed_json_text(json.loads(data[start:-16]), draw)
                path.write_bytes(data[:start] + footer + len(footer).to_bytes(8, "little") + data[-8:])
        return folder

    def _read_token_files(self, folder: Path) -> None:
        sequences = TextSequences([str(folder / "t.txt")], self.tokenizer, 16, str(folder / "cache"), 5)
        read_records(len(sequences), sequences.name, sequences.__getitem__)


def _change_number(content: Any, draw: random.Random) -> None:
    """Changes one number somewhere, so that positions contradict each other."""
    places: list[tuple[Any, Any]] = []

    def visit(value: Any) -> None:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if type(item) is int:
                places.append((value, key))
            elif isinstance(item, dict | list) and len(places) < 500:
                visit(item)

    visit(content)
    if places:
        holder, key = draw.choice(places)
        holder[key] += draw.choice([1, -1, 7, 100, 2**33])
