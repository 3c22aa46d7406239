"""Writes docs/tested_deepspeed_keys.md from the table of DeepSpeed's keys.

Usage: python -m tests.checkpoint.deepspeed_key_table
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from beit3_ds.config.deepspeed_keys import DEEPSPEED_KEYS
from beit3_ds.config.key_specs import ALL_STAGES, Fixed, Refused, Section, Spec
from tests.checkpoint.deepspeed_keys import SECTIONS

DOCUMENT = Path(__file__).parents[2] / "docs" / "tested_deepspeed_keys.md"

_HEAD = """# DeepSpeed's keys

Which keys of DeepSpeed 0.19.8 a run's file may hold. `beit3 check` and every start refuse the others, and other
values, with the reason.

The keys of `zero_optimization`, `bf16`, `data_types` and `communication_data_type` may change where and in which type
weights, moments and gradients are kept. Each value under "tested with" was run on two ranks in every stage that the
row names, in fp32 and bf16 where both are possible: two steps whose losses are those without the key, a save, an
export that equals the model's weights, a start under another layout that holds the same weights, and a resumed run
whose losses and weights equal the uninterrupted run's bit for bit. `tests/checkpoint/test_deepspeed_keys.py` runs all
keys of a stage together in CI, and every key alone among the slow tests.

This file is written by `python -m tests.checkpoint.deepspeed_key_table` from `beit3_ds/config/deepspeed_keys.py`, and
a test compares the two.
"""


def document() -> str:
    """Returns the text of docs/tested_deepspeed_keys.md."""
    keys = list(_walk(DEEPSPEED_KEYS, ""))
    state = [(name, spec) for name, spec in keys if name.split(".")[0] in SECTIONS]
    accepted = [(name, spec) for name, spec in keys if isinstance(spec, Spec) and not isinstance(spec, Fixed)]
    lines = [_HEAD, "## Accepted: how state is kept", ""]
    lines += ["| key | values | ZeRO stages | tested with | effect |", "|---|---|---|---|---|"]
    for name, spec in accepted:
        if name.split(".")[0] in SECTIONS:
            samples = ", ".join(f"`{json.dumps(sample)}`" for sample in spec.samples)
            stages = "all" if spec.stages == ALL_STAGES else ", ".join(map(str, spec.stages))
            lines.append(f"| `{name}` | {_cell(spec.rule)} | {stages} | {samples} | {_cell(spec.effect)} |")
    lines += ["", "## Accepted: the rest", "", "| key | values | effect |", "|---|---|---|"]
    for name, spec in accepted:
        if name.split(".")[0] not in SECTIONS:
            lines.append(f"| `{name}` | {_cell(spec.rule)} | {_cell(spec.effect)} |")
    for title, rows in (
        ("## Refused: how state is kept", state),
        ("## Refused: the rest", [row for row in keys if row not in state]),
    ):
        lines += ["", title, "", "| key | accepted value | reason |", "|---|---|---|"]
        for name, spec in rows:
            if isinstance(spec, Fixed | Refused):
                value = f"only `{spec.rule}`" if isinstance(spec, Fixed) else "none"
                lines.append(f"| `{name}` | {value} | {_cell(spec.reason)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _walk(keys: Mapping[str, Spec | Refused | Section], prefix: str) -> Iterator[tuple[str, Spec | Refused]]:
    for name, spec in keys.items():
        if isinstance(spec, Section):
            yield from _walk(spec.keys, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", spec


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
