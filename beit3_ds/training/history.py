"""The run's record on disk: one JSON object a line, in OUTPUT_DIR/metrics.jsonl."""

import json
from pathlib import Path
from typing import Any


class History:
    """Appends records and reads them back; each record has a "step"."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        """Adds one record."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """All whole records; a last line cut short by a kill is passed over."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return records

    def forget_after(self, step: int) -> None:
        """Drops records of steps that a resumed run will repeat: those beyond `step` updates."""
        kept = [record for record in self.records() if record["step"] <= step]
        if self.path.exists():
            aside = self.path.with_suffix(".tmp")
            aside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
            aside.rename(self.path)
