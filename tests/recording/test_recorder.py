"""What a recorder tells of requests, and what it does not; a disk that hangs holds up nobody."""

import asyncio
import threading
from pathlib import Path

import pytest

from async_cache import AsyncCache, CacheConfig, ConfigError, ModelLayout, ObjectGroup
from async_cache.recording import recorder as module
from async_cache.recording.recorder import Recorder
from async_cache.recording.recording import Recording
from async_cache.recording.rotation import RotatedFile
from async_cache.recording.trace import Hint, read_trace

LAYOUT = ModelLayout("a secret model", (ObjectGroup((16,), "uint8"),), chunk_tokens=256)
SMALL = ModelLayout("another", (ObjectGroup((16,), "uint8"),), chunk_tokens=16)
MOST = 2**20


async def test_requests_and_hints_become_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    async with AsyncCache(CacheConfig(l1_bytes=2**20, l2=())) as cache:
        recording = Recording(cache.core.observers)
        await recording.follow(str(path), MOST)
        long, short = LAYOUT.prompt(range(1000)), LAYOUT.prompt(range(600), salt="")
        other, fine = LAYOUT.prompt(range(600), salt="acme"), SMALL.prompt(range(40))
        for prompt in (long, short, other, fine):
            await cache.prefetch(prompt).load_done
        await cache.hint(short, output_tokens=7, returns=False)
        await cache.lookup(long)
        await recording.close()
        await cache.prefetch(long).load_done
    trace = read_trace(path)
    paths = [request.path for request in trace.requests]
    assert [(r.tokens, r.chunk_tokens, len(r.path)) for r in trace.requests] == [
        (1000, 256, 3),
        (600, 256, 2),
        (600, 256, 2),
        (40, 16, 2),
    ]
    assert paths[1] == paths[0][:2], "a prefix in common is one"
    assert not {*paths[0]} & {*paths[2], *paths[3]}, "salts do not meet"
    (hint,) = trace.hints
    assert (hint.path, hint.hint) == (paths[1], Hint(7, False))
    assert 0 <= trace.requests[0].at_seconds <= hint.at_seconds < 60
    text = path.read_text()
    assert not any(secret in text for secret in ("acme", "secret", "another", long.chunk_hashes[0].hex()[:16]))


async def test_two_recordings_have_no_id_in_common(tmp_path: Path) -> None:
    prompt, ids = LAYOUT.prompt(range(1000)), []
    for name in ("first", "second"):
        recorder = Recorder(tmp_path / name, MOST)
        await recorder.open()
        recorder.asked(prompt)
        await recorder.close(5)
        assert (recorder.recorded, recorder.dropped) == (1, 0)
        ids.append(set(read_trace(tmp_path / name).requests[0].path))
    assert not ids[0] & ids[1]
    with pytest.raises(ConfigError, match="not of one recording"):
        read_trace(tmp_path / "first", tmp_path / "second")


async def test_a_disk_that_hangs_holds_up_nobody_and_what_it_does_not_take_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, write = threading.Event(), RotatedFile.write

    def hang(self: RotatedFile, lines: bytes) -> None:
        answers.wait(100)
        write(self, lines)

    monkeypatch.setattr(RotatedFile, "write", hang)
    monkeypatch.setattr(module, "_MOST_WAITING", 100)
    recorder, prompt = Recorder(tmp_path / "trace", MOST), LAYOUT.prompt(range(2560))
    await recorder.open()
    for _ in range(1000):
        recorder.asked(prompt)
    async with asyncio.timeout(60):  # in less than the disk hangs for
        await recorder.close(0.01)
    assert recorder.dropped == 1000 - 10
    answers.set()
    await recorder.close(30)
    assert (recorder.recorded, len(read_trace(tmp_path / "trace").requests)) == (10, 10)


async def test_a_disk_that_is_full_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed, write = threading.Event(), RotatedFile.write

    def full(self: RotatedFile, lines: bytes) -> None:
        if not failed.is_set():
            failed.set()
            raise OSError(28, "no space left")
        write(self, lines)

    monkeypatch.setattr(RotatedFile, "write", full)
    monkeypatch.setattr(module, "_RETRY_SECONDS", 0.0)
    recorder = Recorder(tmp_path / "trace", MOST)
    await recorder.open()
    recorder.asked(LAYOUT.prompt(range(256)))
    await asyncio.to_thread(failed.wait, 30)
    recorder.asked(LAYOUT.prompt(range(512)))
    await recorder.close(30)
    assert (recorder.recorded, recorder.dropped) == (1, 1)
    assert [request.tokens for request in read_trace(tmp_path / "trace").requests] == [512]


async def test_a_recording_that_cannot_begin_leaves_the_one_before(tmp_path: Path) -> None:
    async with AsyncCache(CacheConfig(l1_bytes=2**20, l2=())) as cache:
        recording = Recording(cache.core.observers)
        await recording.follow(str(tmp_path / "trace"), MOST)
        for path in ("/nowhere/trace", "/dev/full", str(tmp_path)):
            with pytest.raises(ConfigError, match=path):
                await recording.follow(path, MOST)
        await cache.prefetch(LAYOUT.prompt(range(256))).load_done
        await recording.follow(str(tmp_path / "trace"), 2 * MOST)
        await cache.prefetch(LAYOUT.prompt(range(256))).load_done
        await recording.follow("", MOST)
    assert len(read_trace(tmp_path / "trace").requests) == 2


async def test_an_opening_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, begun = threading.Event(), RotatedFile.__init__

    def hang(self: RotatedFile, *arguments: object) -> None:
        answers.wait(100)
        begun(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(RotatedFile, "__init__", hang)
    monkeypatch.setattr(module, "_OPEN_SECONDS", 0.01)
    recorder = Recorder(tmp_path / "trace", MOST)
    with pytest.raises(ConfigError, match="cannot be written to within"):
        await recorder.open()
    answers.set()
    await recorder.close(30)
    monkeypatch.undo()
    RotatedFile(tmp_path / "trace", MOST, b'{"format":"async-cache trace","x":1}\n').close()
