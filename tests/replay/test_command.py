"""`async-cache replay` as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "async_cache", "replay", *arguments], capture_output=True, text=True, timeout=150
    )


@pytest.fixture
def trace(tmp_path: Path) -> str:
    """Six prompts of two chunks, of which three come again."""
    path = tmp_path / "trace.jsonl"
    numbers = [1, 2, 3, 1, 2, 3]
    rows = [
        {"timestamp": 1000 * at, "input_length": 1024, "output_length": 1, "hash_ids": [number, number]}
        for at, number in enumerate(numbers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_it_prints_hits_by_policy_and_capacity(trace: str) -> None:
    done = run(trace, "--capacity", "2MiB,3MiB", "--bytes-per-token", "1KiB", "--policy", "lru,foresight", "--json")
    assert done.returncode == 0, done.stderr
    found = {(row["policy"], row["capacity_bytes"] >> 20): row["hit_rate"] for row in json.loads(done.stdout)}
    assert found == {("lru", 2): 0.0, ("lru", 3): 1.0, ("foresight", 2): pytest.approx(2 / 3), ("foresight", 3): 1.0}


def test_it_draws_a_plot(trace: str, tmp_path: Path) -> None:
    plot = tmp_path / "hits.svg"
    done = run(trace, "--capacity", "2MiB", "--bytes-per-token", "1KiB", "--policy", "lru", "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    assert "lru" in done.stdout
    assert plot.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--policy", "lfu"], "--policy: there is no policy 'lfu'"),
        (["--capacity", "12"], "--capacity: a chunk takes 512 KiB"),
        (["--capacity", "much"], "--capacity: "),
        (["--bytes-per-token", "0"], "--bytes-per-token: must be more than 0"),
        (["--plot", "/nowhere/x.svg"], "/nowhere/x.svg"),
        (["--plot", "x.strange"], "--plot: "),
    ],
)
def test_what_makes_no_sense_is_one_line(trace: str, arguments: list[str], told: str) -> None:
    given = {"--capacity": "2MiB", "--bytes-per-token": "1KiB", "--policy": "lru"} | dict([arguments])
    done = run(trace, *[word for option in given.items() for word in option])
    assert done.returncode == 1
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_trace_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = run(str(tmp_path / "none"))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "none cannot be read" in done.stderr
