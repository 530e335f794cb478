"""The benchmarks run, at sizes that measure nothing: what they call is there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("hashing", ()),
        ("hits", ("0.015625",)),
        ("index", ("timed", "1000")),
        ("index", ("restart", "1000")),
        ("l2/tiers", ("4",)),
    ],
)
def test_a_benchmark_runs(script: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = subprocess.run(
        (sys.executable, BENCHMARKS / f"{script}.py", *arguments),
        env={"PATH": "", "PYTHONPATH": str(BENCHMARKS.parent), "HOME": str(tmp_path), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    figures = [value for row in (rows if isinstance(rows, list) else [rows]) for value in row.values()]
    assert any(isinstance(figure, float) and figure > 0 for figure in figures)


@pytest.mark.parametrize("part", ["valkey", "object_store", "mooncake", "codecs", "tiers"])
def test_the_backends_are_measured_and_told_what_was_aimed_at(part: str, tmp_path: Path) -> None:
    done = subprocess.run(
        (sys.executable, BENCHMARKS / "backends.py", "--small", part),
        env={"PATH": "", "PYTHONPATH": str(BENCHMARKS.parent), "HOME": str(tmp_path), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    measured, _, aims = done.stdout.partition("## What was aimed at")
    assert f"## {part}\n\n| " in measured
    told = [line.strip("| ").split(" | ") for line in aims.splitlines() if line.startswith("| ")][1:]
    assert told and all(row[-1] in ("yes", "no") for row in told if "LMCache" not in row[0])  # it is not installed here
