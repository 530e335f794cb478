"""What a process holds that means something to others, its forked children do not hold."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from async_cache.aio.forks import keep_from_children, process
from async_cache.errors import ConfigError
from async_cache.recording.rotation import RotatedFile

HEADER = b"ours,1\n"


class Holder:
    def __init__(self, *descriptors: int) -> None:
        self._descriptors = descriptors

    def descriptors(self) -> tuple[int, ...]:
        return self._descriptors


@contextmanager
def child() -> Iterator[None]:
    """While there is a forked child, which does nothing."""
    there, alone = os.pipe(), os.pipe()
    number = os.fork()
    if not number:
        os.close(alone[1])
        os.write(there[1], b".")
        os.read(alone[0], 1)
        os._exit(0)
    try:
        assert os.read(there[0], 1) == b"."
        yield
    finally:
        os.close(alone[1])
        _, status = os.waitpid(number, 0)
        for descriptor in (*there, alone[0]):
            os.close(descriptor)
        assert status == 0


def test_a_lock_ends_with_its_holder_though_a_child_lives_on(tmp_path: Path) -> None:
    path = tmp_path / "file"
    descriptor, other = (os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(2))
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    holder = Holder(descriptor, -1)
    keep_from_children(holder)
    with child():
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


def test_a_connection_ends_with_its_holder_though_a_child_lives_on() -> None:
    ours, peers = socket.socketpair()
    holder = Holder(ours.fileno())
    keep_from_children(holder)
    with ours, peers, child():
        peers.setblocking(False)
        with pytest.raises(BlockingIOError):
            peers.recv(1)
        ours.close()
        assert peers.recv(1) == b""


def test_who_has_recorded_keeps_nobody_from_it_though_a_child_lives_on(tmp_path: Path) -> None:
    first = RotatedFile(tmp_path / "trace", 2**20, HEADER)
    with child():
        with pytest.raises(ConfigError, match="another process records"):
            RotatedFile(tmp_path / "trace", 2**20, HEADER)
        first.close()
        RotatedFile(tmp_path / "trace", 2**20, HEADER).close()


def test_a_child_is_another_process_and_has_the_numbers_of_what_it_does_not_hold() -> None:
    here = process()
    reading, writing = os.pipe()
    holder = Holder(reading)
    keep_from_children(holder)
    if not (number := os.fork()):
        os._exit(0 if process() is not here and os.read(reading, 1) == b"" and not os.close(reading) else 1)
    assert os.waitpid(number, 0)[1] == 0
    assert process() is here
    os.close(reading)
    os.close(writing)
