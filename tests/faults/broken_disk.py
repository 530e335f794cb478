"""A disk that breaks on demand: a directory that FUSE passes through, in a process of its own.

Run as a program, it serves the directory. A line `read eio` on its standard input has all reads fail from then on;
when the input ends, it unmounts and exits: so it outlives no test, even one that is killed.
"""

import ctypes
import errno
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Literal

import mfusepy
import pytest

from .disk import process, say

_libc = ctypes.CDLL(None, use_errno=True)

SLOW_SECONDS = 0.02
STUCK_SECONDS = 50  # for ever, to those who wait; but a test that fails has an end
SHORT_BYTES = 1500
SOMETIMES = 0.05  # of the calls


class BrokenDisk:
    """The disk, as a test sees it: a `path` on it that is its own, and the `source` where that really is."""

    def __init__(self, directory: Path, kind: Literal["plain", "flushing"] = "plain"):
        self._kind = kind
        self._source, self._mount = directory / "source", directory / "broken"
        self._paths = 0

    def start_anew(self) -> None:
        """Another path for another test."""
        self._paths += 1
        self.source, self.path = self._source / str(self._paths), self._mount / str(self._paths)

    @contextmanager
    def mounted(self) -> Iterator["BrokenDisk"]:
        self._source.mkdir()
        self._mount.mkdir()
        with self.mounted_again():
            yield self

    @contextmanager
    def mounted_again(self) -> Iterator["BrokenDisk"]:
        """In the same place, when it has died."""
        subprocess.run(["umount", "--lazy", self._mount], capture_output=True)
        try:
            with process(__name__, self._source, self._mount, self._kind) as self.child:
                if self.child.stdout.readline() != "mounted\n":
                    pytest.skip("cannot mount a FUSE file system")
                yield self
        finally:
            subprocess.run(["umount", "--lazy", self._mount], capture_output=True)

    @contextmanager
    def broken(self, verb: str, fault: str) -> Iterator[None]:
        """For a while, calls of this verb of `Passthrough`, or of "any", raise "eio" or "erofs", are "slow" or "stuck".

        They may raise "sometimes eio", one in twenty. With the verb "bad", what has the fault in its name cannot be
        read. A read may also be "short", be told of an "early end", or get a wrong "bit"; a `getattr` may tell that
        files have "no links".
        """
        self._say(verb, fault)
        try:
            yield
        finally:
            self._say("all", "well")

    def _say(self, *words: str) -> None:
        self.child.stdin.write(" ".join(words) + "\n")
        assert self.child.stdout.readline() == "done\n"

    def dies(self) -> None:
        """From now on every call fails."""
        self.child.kill()
        self.child.wait()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """For a while nothing is answered."""
        self.child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.child.pid, os.WSTOPPED)  # its threads answer until then
        try:
            yield
        finally:
            self.child.send_signal(signal.SIGCONT)


def breakable(method: Callable[..., Any]) -> Callable[..., Any]:
    """Fails, is slow or never returns, as long as that is asked of calls of this name."""

    @wraps(method)
    def call(self: "Passthrough", *arguments: Any) -> Any:
        match self.faults.get(method.__name__, self.faults.get("any")):
            case "sometimes eio" if self.chance.random() < SOMETIMES:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            case "eio" | "erofs" as name:
                number = getattr(errno, name.upper())
                raise OSError(number, os.strerror(number))
            case "slow":
                time.sleep(SLOW_SECONDS)
            case "stuck":
                self.healed.wait(STUCK_SECONDS)
        return method(self, *arguments)

    return call


class Passthrough(mfusepy.Operations):
    """Everything that the backend asks of a directory, passed on to another one."""

    use_ns = True

    def __init__(self, source: str):
        self.source = source
        self.faults: dict[str, str] = {}
        self.bad = ""
        self.chance = random.Random(1)
        self.healed = threading.Event()

    def init(self, path: str) -> None:
        say("mounted")

    def obey(self, mountpoint: str) -> None:
        """Do what the lines of standard input say, and end with them."""
        for line in sys.stdin:
            verb, fault = line.strip().split(" ", 1)
            if fault == "well":
                self.faults.clear()
                self.bad = ""
                self.healed.set()
            elif verb == "bad":
                self.bad = fault
            else:
                self.healed.clear()
                self.faults[verb] = fault
            say("done")
        self.healed.set()
        subprocess.run(["umount", "--lazy", mountpoint])
        os._exit(0)

    def _at(self, path: str) -> str:
        return self.source + path

    # Names.

    @breakable
    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        status = os.lstat(self._at(path)) if fh is None else os.fstat(fh)
        if self.faults.get("getattr") == "no links" and not stat.S_ISDIR(status.st_mode):
            return self._fields(status) | {"st_nlink": 0}
        return self._fields(status)

    @staticmethod
    def _fields(status: os.stat_result) -> dict[str, Any]:
        names = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks")
        times = {name: getattr(status, f"{name}_ns") for name in ("st_atime", "st_mtime", "st_ctime")}
        return {name: getattr(status, name) for name in names} | times

    @breakable
    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *os.listdir(self._at(path))]

    @breakable
    def rename(self, old: str, new: str) -> None:
        os.rename(self._at(old), self._at(new))

    @breakable
    def unlink(self, path: str) -> None:
        os.unlink(self._at(path))

    @breakable
    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self._at(path), mode)

    # Files.

    @breakable
    def create(self, path: str, mode: int, fi: Any = None) -> int:
        return os.open(self._at(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

    @breakable
    def open(self, path: str, flags: int) -> int:
        return os.open(self._at(path), flags & os.O_ACCMODE)

    @breakable
    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        if self.bad and self.bad in path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        data = os.pread(fh, size, offset)
        match self.faults.get("read"):
            case "short":
                return data[:SHORT_BYTES]
            case "early end":
                return data[: max(0, SHORT_BYTES - offset)]
            case "bit":
                return bytes([data[0] ^ 1]) + data[1:]
        return data

    @breakable
    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        return os.pwrite(fh, data, offset)

    @breakable
    def truncate(self, path: str, length: int, fh: int | None = None) -> None:
        os.truncate(self._at(path) if fh is None else fh, length)

    @breakable
    def fallocate(self, path: str, mode: int, offset: int, size: int, fh: int) -> None:
        if _libc.fallocate(fh, mode, ctypes.c_int64(offset), ctypes.c_int64(size)):
            raise OSError(ctypes.get_errno(), "fallocate")

    @breakable
    def fsync(self, path: str, datasync: int, fh: int) -> None:
        os.fsync(fh)

    @breakable
    def fsyncdir(self, path: str, datasync: int, fh: int) -> None:
        pass

    def release(self, path: str, fh: int) -> None:
        os.close(fh)


class Flushing(Passthrough):
    """Is asked at each close of a file, too."""

    @breakable
    def flush(self, path: str, fh: int) -> None:
        pass


def serve(source: str, mountpoint: str, kind: str) -> None:
    operations = {"flushing": Flushing, "plain": Passthrough}[kind](source)
    threading.Thread(target=operations.obey, args=(mountpoint,), daemon=True).start()
    cached = dict.fromkeys(("attr_timeout", "entry_timeout"), 0)  # every call reaches us
    mfusepy.FUSE(operations, mountpoint, foreground=True, direct_io=True, hard_remove=True, **cached)


if __name__ == "__main__":
    serve(*sys.argv[1:])
