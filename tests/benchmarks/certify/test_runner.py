"""Tests how `beit3 certify` runs its sections.

A section that hangs or crashes does not stop the others. A second call runs only the sections that are missing.
"""

import json
import os
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.benchmarks.certify import plan as shipped
from beit3_ds.benchmarks.certify.plan import Section
from beit3_ds.benchmarks.certify.runner import certify, describe_plan
from beit3_ds.config import ConfigError

Make = Callable[..., Section]
ONE = "recorder.measure('one', lambda: {'ms': 1.5})"


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Returns a function that writes the module of a section and describes the section."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.getcwd()]))

    def write(name: str, code: str = ONE, limit: int = 20) -> Section:
        body = textwrap.indent(textwrap.dedent(code), "    ")
        (folder / f"fake_{name}.py").write_text(f"import os, subprocess, time\ndef measure(recorder):\n{body}\n")
        return Section(name=name, title=f"Title of {name}", module=f"fake_{name}", seconds=1, limit=limit)

    return write


@pytest.fixture
def run(make: Make, tmp_path: Path) -> Callable[..., int]:
    def call(plan: list[Section], device: str = "none", **options: Any) -> int:
        facts = f"devices=['{device}'], commit='c', source='s', versions={{'torch': '2'}}, absent=['deepspeed']"
        machine = make("machine", f"recorder.add('machine', {facts})")
        return certify(tmp_path / "out", plan=plan, machine=machine, **options)

    return call


def report(tmp_path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((tmp_path / "out" / "certificate.json").read_text())
    return {**content, "by_name": {section["name"]: section for section in content["sections"]}}


def begun(tmp_path: Path, call: int) -> list[str]:
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    items = [line["section"] for line in lines if line.get("begun") and line["call"] == call]
    return list(dict.fromkeys(items))


def test_a_section_that_hangs_or_crashes_loses_only_itself(make: Make, run: Callable[..., int], tmp_path: Path) -> None:
    child = tmp_path / "child"
    hang = f"""
        {ONE}
        open({str(child)!r}, "w").write(str(subprocess.Popen(["sleep", "60"]).pid))
        recorder.measure("two", lambda: time.sleep(60))
    """
    crash = f"""
        {ONE}
        recorder.measure("two", lambda: os._exit(3))
        recorder.measure("three", lambda: {{"ms": 2.5}})
    """
    wrong = """
        recorder.measure("error", lambda: 1 / 0)
        recorder.measure("check", lambda: {"passed": False})
        recorder.measure("package", lambda: __import__("no_such_package"))
    """
    plan = [
        make("first"),
        make("hang", hang, limit=2),
        make("crash", crash),
        make("wrong", wrong),
        make("absent", "import another_absent_package"),
        make(
            "device",
            "from beit3_ds.benchmarks.certify.recorder import NeedsDeviceError\nraise NeedsDeviceError",
        ),
        make("last"),
    ]
    start = time.monotonic()
    assert run(plan) == 1
    assert time.monotonic() - start < 50
    content = report(tmp_path)
    found = content["by_name"]
    assert list(found) == [section.name for section in plan]  # in order of value
    assert not content["ok"] and content["machine"]["absent"] == ["deepspeed"]
    assert found["first"]["ok"] and found["first"]["items"] == {"one": {"ms": 1.5}}
    assert found["hang"]["status"] == "killed after 2 s"
    assert found["hang"]["items"] == {"one": {"ms": 1.5}, "two": {"error": "it began and did not end"}}
    assert not Path(f"/proc/{child.read_text()}").exists() or "Z" in Path(f"/proc/{child.read_text()}/stat").read_text()
    # The section starts again behind the item that crashed it.
    assert found["crash"]["items"]["two"] == {"error": "it began and did not end"}
    assert found["crash"]["items"]["three"] == {"ms": 2.5} and found["crash"]["failed"] == ["two"]
    assert (
        found["wrong"]["failed"] == ["error", "check"]
        and "ZeroDivisionError" in found["wrong"]["items"]["error"]["error"]
    )
    assert found["wrong"]["items"]["package"] == {"absent": "no_such_package"}
    assert found["absent"]["status"] == "absent: another_absent_package" and found["absent"]["ok"]
    assert found["device"]["status"] == "needs a CUDA device" and found["device"]["ok"]
    assert found["last"]["ok"]
    text = (tmp_path / "out" / "certificate.md").read_text()
    for expected in (
        "| hang | killed after 2 s | 1 |",
        "## Title of first",
        "| item | ms |",
        "| one | 1.5 |",
        "**no**",
    ):
        assert expected in text
    assert '* absent: ["deepspeed"]' in text


def test_a_second_call_runs_the_rest(make: Make, run: Callable[..., int], tmp_path: Path) -> None:
    slow = f"{ONE}\nrecorder.measure('two', lambda: time.sleep(SECONDS) or {{'ms': 2.0}})"
    plan = [make("first"), make("slow", slow.replace("SECONDS", "60")), make("last")]
    assert run(plan, minutes=6 / 60) == 1
    assert begun(tmp_path, 1) == ["first", "slow"]  # "last" had no time
    assert report(tmp_path)["by_name"]["last"]["status"] == "not begun"
    plan[1] = make("slow", slow.replace("SECONDS", "0"))
    assert run(plan) == 0
    assert begun(tmp_path, 2) == ["last", "slow"]  # what never began comes first
    assert report(tmp_path)["by_name"]["slow"]["items"] == {"one": {"ms": 1.5}, "two": {"ms": 2.0}}
    lines = (tmp_path / "out" / "results.jsonl").read_text()
    assert lines.count('"section": "slow", "item": "one"') == 2  # begun and measured in the first call only
    assert run(plan) == 0 and begun(tmp_path, 3) == []
    with pytest.raises(ConfigError, match="has results with devices \\['none'\\], but here they are \\['other'\\]"):
        run(plan, device="other")


def test_a_second_call_repeats_what_failed(make: Make, run: Callable[..., int], tmp_path: Path) -> None:
    """Catches the report of an old failure after its cause was fixed, and good figures that are measured again."""
    faulty = f"{ONE}\nrecorder.measure('error', lambda: 1 / 0)\nrecorder.measure('check', lambda: {{'passed': False}})"
    assert run([make("faulty", faulty)]) == 1
    corrected = faulty.replace("1 / 0", "{'ms': 1.0}").replace("False", "True").replace("1.5", "9.9")
    assert run([make("faulty", corrected)]) == 0
    items = {"one": {"ms": 1.5}, "error": {"ms": 1.0}, "check": {"passed": True}}
    assert report(tmp_path)["by_name"]["faulty"]["items"] == items


def test_a_section_without_a_status_runs_once_although_it_has_a_failure(
    make: Make, run: Callable[..., int], tmp_path: Path
) -> None:
    """Checks results of a call that was killed: it recorded a failed measurement, but no status of the section."""
    assert run([make("first")]) == 0
    with open(tmp_path / "out" / "results.jsonl", "a") as file:
        file.write(json.dumps({"section": "cut", "item": "one", "call": 1, "error": "RuntimeError"}) + "\n")
    assert run([make("first"), make("cut")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines if line.get("section") == "cut" and "status" in line] == ["done"]


def test_a_cut_line_costs_only_itself(make: Make, run: Callable[..., int], tmp_path: Path) -> None:
    assert run([make("first")]) == 0
    with open(tmp_path / "out" / "results.jsonl", "a") as file:
        file.write('{"section": "first", "item": "cut", "ms"')
    assert run([make("first"), make("last")]) == 0
    assert report(tmp_path)["by_name"]["last"]["items"] == {"one": {"ms": 1.5}}
    assert [line["call"] for line in report(tmp_path)["calls"]] == [1, 2]


def test_kernels_in_the_cache_are_counted(
    make: Make,
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a second section that compiles again, and counts that a section loses when it crashes."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    launch = """
        import torch, triton, triton.language as tl
        @triton.jit
        def kernel(x, N: tl.constexpr):
            tl.store(x, N)
        recorder.measure("launch", lambda: {"launched": bool(kernel[(1,)](torch.zeros(8), 8))})
    """
    crash = launch + "    recorder.measure('crash', lambda: os._exit(3))"
    assert run([make("first", launch), make("crash", crash, limit=120)], architecture=90) == 1
    found = report(tmp_path)["by_name"]
    assert [found[name]["kernels"] for name in ("first", "crash")] == ["0 cached, 1 compiled", "1 cached, 0 compiled"]
    assert "crash" in found["crash"]["failed"]
    assert "done; kernels: 0 cached, 1 compiled" in capsys.readouterr().out
    assert "| 1 cached, 0 compiled |" in (tmp_path / "out" / "certificate.md").read_text()


def test_the_exit_status_is_that_of_the_chosen_sections(make: Make, run: Callable[..., int], tmp_path: Path) -> None:
    plan = [make("first"), make("wrong", "recorder.measure('error', lambda: 1 / 0)")]
    assert run(plan, only=["first"]) == 0
    assert not report(tmp_path)["ok"]  # the other section has not begun
    assert run(plan, only=["wrong"]) == 1
    assert run(plan, only=["first"]) == 0
    assert run(plan) == 1


def test_mistakes(make: Make, run: Callable[..., int], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no section is called 'nothing'; there are 'first'"):
        run([make("first")], only=["nothing"])
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(ConfigError, match="files that are no results of"):
        run([make("first")])


def test_plan() -> None:
    """Catches a section whose module does not exist, and a time limit below the estimated time."""
    root = Path(shipped.__file__).parents[3]
    names = [section.name for section in shipped.PLAN]
    assert len(set(names)) == len(names) and names[:4] == ["ceilings", "correctness", "operators", "steps"]
    for section in (shipped.MACHINE, *shipped.PLAN):
        source = (root / section.module.replace(".", "/")).with_suffix(".py").read_text()
        assert "\ndef measure(recorder: Recorder) -> None:" in source
        assert section.seconds <= section.limit
    assert all(name in describe_plan() for name in names)


def test_a_dry_run_emulates_a_gpu(make: Make, run: Callable[..., int], tmp_path: Path) -> None:
    """Catches a dry run that measures the CPU, counts as a check, or mixes its results with those of a GPU."""
    code = """
        import torch
        from beit3_ds.benchmarks.certify.device_kind import kind_of
        kind = kind_of(torch.device("cpu"))
        recorder.measure("kind", lambda: {"kind": kind, "name": torch.cuda.get_device_name(), "passed": False})
    """
    assert run([make("first", code)], architecture=90) == 0
    items = report(tmp_path)["by_name"]["first"]["items"]
    assert items == {"kind": {"kind": "dry", "name": "dry run of NVIDIA H100"}}
