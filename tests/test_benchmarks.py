"""The benchmarks run, at sizes that measure nothing: what they call is there."""

import gzip
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
        ("steps", ("4096", "4")),
        ("streams", ("4",)),
        ("l2/local_store", ("store_some", "4096", "4", "3")),
    ],
)
def test_a_benchmark_runs(script: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = subprocess.run(
        (sys.executable, BENCHMARKS / f"{script}.py", *arguments),
        env={"PATH": "", "PYTHONPATH": str(BENCHMARKS.parent), "HOME": str(tmp_path), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=150,
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
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    measured, _, aims = done.stdout.partition("## What was aimed at")
    assert f"## {part}\n\n| " in measured
    told = [line.strip("| ").split(" | ") for line in aims.splitlines() if line.startswith("| ")][1:]
    assert told and all(row[-1] in ("yes", "no") for row in told if "LMCache" not in row[0])  # it is not installed here


def test_a_trace_of_passages_is_replayed_both_ways(tmp_path: Path) -> None:
    one, other = ["passage", 1, 70], ["passage", 2, 96]
    with gzip.open(tmp_path / "trace.gz", "wt") as file:
        for parts in ([one, other], [other, one], [["user", 3, 40], one]):
            file.write(json.dumps({"parts": parts}) + "\n")
    done = subprocess.run(
        (sys.executable, BENCHMARKS / "ragpulse.py", tmp_path / "trace.gz", "--l1", "16MiB"),
        env={"PATH": "", "PYTHONPATH": str(BENCHMARKS.parent)},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    assert "of which 236 (53.4%) could be reused" in done.stdout
    found = {row[0]: row[1:4] for line in done.stdout.splitlines() if (row := line.strip("| ").split(" | "))[1:]}
    assert found["prefixes alone"] == ["0.0%", "0.000", "416"]
    assert found["segments"] == ["50.7%", "0.949", "160"]
