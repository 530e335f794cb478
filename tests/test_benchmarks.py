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
