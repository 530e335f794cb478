"""`async-cache replay --timed` against servers that run, go away, hang, or are interrupted."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest

from async_cache import connect

from .programs import ServerProcess, server
from .support import wait_until


def written(path: Path, count: int, *, apart_ms: int = 10) -> Path:
    """Requests of three prompts of two chunks and a tail, in turns."""
    rows = [
        {"timestamp": at * apart_ms, "input_length": 1100, "output_length": 5, "hash_ids": [at % 3, 7, 100 + at]}
        for at in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(served: ServerProcess, trace: Path, *more: str) -> list[str]:
    options = ["--timed", "--bytes-per-token", "1KiB", "--url", served.url, "--json", *more]
    return [sys.executable, "-m", "async_cache", "replay", str(trace), *options]


def run(served: ServerProcess, trace: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(served, trace, *more), capture_output=True, text=True, timeout=150)


async def chunks_left(served: ServerProcess) -> int:
    async with connect(served.url) as cache:
        stats = await cache.stats()
    return stats.l1_chunks + sum(usage.objects for usage in stats.backends.values())


async def test_requests_are_asked_for_at_their_pace_read_and_stored(tmp_path: Path) -> None:
    trace, recorded, plot = written(tmp_path / "trace", 60), tmp_path / "recorded", tmp_path / "times.svg"
    with server(tmp_path, server_record=str(recorded)) as served:
        done = await asyncio.to_thread(run, served, trace, "--plot", str(plot), "--pace", "2", "--at-once", "1")
        assert (done.returncode, done.stderr) == (0, "")
        told = json.loads(done.stdout)
        assert (told["whole"], told["requests"], told["lookup_seconds"]["count"]) == (True, 60, 60)
        assert told["l1_tokens"] == 57 * 1024, "the first of each prompt is not there"
        assert told["asked_tokens"] == 60 * 1100 and told["store_seconds"]["count"] == 3
        assert not any(told[count] for count in ("broken", "damaged", "not_stored", "failed"))
        assert 0 < told["lookup_seconds"]["p50"] <= told["lookup_seconds"]["p99"]
        assert plot.read_text().startswith("<?xml")
        assert await chunks_left(served) == 0, "what it stored is removed"
        assert served.stop() == 0
    lines = [json.loads(line) for line in recorded.read_text().splitlines()[1:]]
    assert [line["tokens"] for line in lines if "hint" not in line] == [1024] * 60
    assert lines[-1]["at"] - lines[0]["at"] > 59 * 0.01 / 2 * 0.9, "not faster than the pace"
    assert [line["hint"] for line in lines if "hint" in line] == [{"output_tokens": 5}] * 60


async def test_what_is_in_storage_is_loaded_and_read_as_it_was_written(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    rows = [{"timestamp": at, "input_length": 1024, "hash_ids": [at % 8, 7]} for at in range(40)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with server(tmp_path, l1="5MiB") as served:
        done = await asyncio.to_thread(run, served, trace, "--at-once", "1")
        told = json.loads(done.stdout)
    assert told["l2_tokens"] > 0 and told["load_seconds"]["count"] > 0 and told["damaged"] == told["failed"] == 0


async def begun(served: ServerProcess, trace: Path) -> asyncio.subprocess.Process:
    """A replay that has stored something."""
    child = await asyncio.create_subprocess_exec(*command(served, trace), stdout=PIPE, stderr=PIPE)
    async with connect(served.url) as cache:

        async def is_stored() -> bool:
            await asyncio.sleep(0.02)
            return (await cache.stats()).l1_chunks > 0

        await wait_until(is_stored, 30)
    return child


async def test_a_server_that_goes_away_is_one_line(tmp_path: Path) -> None:
    trace = written(tmp_path / "trace", 100_000, apart_ms=5)
    with server(tmp_path, l2=()) as served:
        child = await begun(served, trace)
        served.kill()
        output, errors = await asyncio.wait_for(child.communicate(), 150)
    assert (child.returncode, output) == (1, b"")
    told = errors.decode()
    assert told.count("\n") == 1 and "the server is gone, after" in told and "of 100,000 requests" in told


async def test_an_interrupt_tells_what_was_measured_and_leaves_nothing(tmp_path: Path) -> None:
    trace = written(tmp_path / "trace", 100_000, apart_ms=5)
    with server(tmp_path) as served:
        child = await begun(served, trace)
        child.send_signal(signal.SIGINT)
        output, errors = await asyncio.wait_for(child.communicate(), 150)
        told = json.loads(output)
        assert (child.returncode, errors, told["whole"]) == (130, b"", False)
        assert 0 < told["requests"] < 100_000
        assert await chunks_left(served) == 0


@pytest.mark.parametrize("more", [["--url", "unix:///nowhere/s"], ["--bytes-per-token", "0"], ["--url", "http://x"]])
def test_what_cannot_be_done_is_one_line(tmp_path: Path, more: list[str]) -> None:
    trace = written(tmp_path / "trace", 3)
    options = ["--timed", "--url", f"unix://{tmp_path}/s", *more]
    done = subprocess.run(
        [sys.executable, "-m", "async_cache", "replay", str(trace), *options],
        capture_output=True,
        text=True,
        timeout=150,
        env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)},
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


async def test_a_trace_that_is_bad_is_one_line_before_anything_is_asked(tmp_path: Path) -> None:
    trace = written(tmp_path / "trace", 100_000)
    trace.write_text(trace.read_text() + '{"timestamp": 1}\n')
    with server(tmp_path, l2=()) as served:
        done = await asyncio.to_thread(run, served, trace)
        assert "is let in" not in served.log
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "line 100001" in done.stderr
