"""A file within its bound: what is written can be read, whatever happens to the disk meanwhile."""

import errno
import gzip
import os
from pathlib import Path

import msgspec
import pytest

from async_cache.errors import ConfigError
from async_cache.recording.rotation import RotatedFile
from async_cache.recording.trace import FORMAT, Header, Line, read_trace

HEADER = msgspec.json.encode(Header(FORMAT, 1, 256, "run")) + b"\n"
MOST = 2**20


def line(number: int, chunks: int = 50) -> bytes:
    ids = [os.urandom(8).hex() for _ in range(chunks)]
    return msgspec.json.encode(Line(float(number), 256 * chunks, ids)) + b"\n"


def files(path: Path) -> list[Path]:
    return [path, *sorted(path.parent.glob(f"{path.name}.*.gz"))]


def test_files_keep_to_the_bound_and_are_one_trace(tmp_path: Path) -> None:
    path, most_found = tmp_path / "trace", 0
    file = RotatedFile(path, MOST, HEADER)
    for number in range(3000):
        file.write(line(number))
        most_found = max(most_found, sum(each.stat().st_size for each in tmp_path.iterdir()))
    assert MOST / 2 < most_found <= MOST
    assert file.used_bytes == sum(each.stat().st_size for each in files(path))
    times = [request.at_seconds for request in read_trace(*files(path)).requests]
    assert times == [float(number) for number in range(3000 - len(times), 3000)], "the newest, and nothing between"
    assert len(times) > 800 and len(files(path)) > 4


def test_a_smaller_bound_holds_from_the_next_full_file_on(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    file = RotatedFile(path, 4 * MOST, HEADER)
    for number in range(4000):
        file.write(line(number))
    file.most_bytes = MOST
    for number in range(1000):
        file.write(line(number))
    assert sum(each.stat().st_size for each in tmp_path.iterdir()) <= MOST


def test_what_failed_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace"
    file = RotatedFile(path, MOST, HEADER)
    file.write(line(1))
    write, truncate = os.pwrite, os.ftruncate

    def half(descriptor: int, data: bytes, offset: int) -> int:
        monkeypatch.setattr(os, "pwrite", full)
        return write(descriptor, data[: len(data) // 2], offset)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    for is_stuck in (False, True):
        monkeypatch.setattr(os, "pwrite", half)
        if is_stuck:
            monkeypatch.setattr(os, "ftruncate", full)
        with pytest.raises(OSError, match="no space"):
            file.write(line(2))
        monkeypatch.setattr(os, "pwrite", write)
        monkeypatch.setattr(os, "ftruncate", truncate)
    file.write(line(3, chunks=1))
    assert [request.at_seconds for request in read_trace(path).requests] == [1.0, 3.0]


def test_a_file_that_was_taken_away_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    file = RotatedFile(path, MOST, HEADER)
    file.write(line(1))
    path.rename(tmp_path / "elsewhere")
    file.write(line(2))
    path.unlink()
    file.write(line(3))
    assert [request.at_seconds for request in read_trace(tmp_path / "elsewhere", path).requests] == [1.0, 3.0]


def test_what_is_there_is_kept_if_it_is_ours_and_left_alone_if_not(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    first = RotatedFile(path, MOST, HEADER)
    first.write(line(1))
    with pytest.raises(ConfigError, match="another process records"):
        RotatedFile(path, MOST, HEADER)
    first.close()
    RotatedFile(path, MOST, HEADER).close()
    with gzip.open(tmp_path / "trace.1.gz", "rt") as kept:
        assert kept.readline().encode() == HEADER
    other = tmp_path / "passwords"
    other.write_text("of others")
    with pytest.raises(ConfigError, match="is no trace"):
        RotatedFile(other, MOST, HEADER)
    assert other.read_text() == "of others" and path.stat().st_mode & 0o077 == 0
