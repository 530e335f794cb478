"""How the scheduler's process hears that saves have ended, also between steps: a pipe, which the workers write to."""

import os
import select
import stat
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

_NUMBER = struct.Struct("=q")
_READ_BYTES = 1024 * _NUMBER.size
_LOST_SECONDS = 300.0  # a report that has not come by then never does: no save takes so long


@dataclass(frozen=True)
class Report:
    """Where the worker of each rank reports that save `number` has ended: the pipe at `path`, if it is still `inode`.

    A save has ended when nothing of it can come to the server any more.
    """

    path: str
    inode: int
    number: int

    def send(self) -> None:
        """Report it, without waiting. Raises OSError where the pipe cannot be reached, as from another host."""
        pipe = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(pipe)
            if not stat.S_ISFIFO(found.st_mode) or found.st_ino != self.inode:
                raise FileNotFoundError(f"{self.path} is not the scheduler's pipe any more")
            os.write(pipe, _NUMBER.pack(self.number))
        finally:
            os.close(pipe)


@dataclass(slots=True)
class _Save:
    """A save that has not ended: how many ranks have not reported its end, and since when it is under way."""

    ranks: int
    begun_at: float


class SavesUnderWay:
    """The saves that the workers of so many ranks were told to make, each until all of them have reported its end."""

    def __init__(self, ranks: int, clock: Callable[[], float] = time.monotonic):
        self._ranks = ranks
        self._clock = clock
        self._reading, self._writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._path = f"/proc/{os.getpid()}/fd/{self._writing}"
        self._inode = os.fstat(self._writing).st_ino
        self._number = 0
        self._saves: dict[int, _Save] = {}  # by number, the oldest first

    def begin(self) -> Report:
        """Note one more save; where its end is to be reported."""
        self._hear()
        self._number += 1
        self._saves[self._number] = _Save(self._ranks, self._clock())
        return Report(self._path, self._inode, self._number)

    def __len__(self) -> int:
        """How many have not ended, as far as is known now."""
        self._hear()
        return len(self._saves)

    def wait(self, timeout_seconds: float) -> bool:
        """Wait until all have ended; whether they have."""
        end, heard = time.monotonic() + timeout_seconds, select.poll()
        heard.register(self._reading, select.POLLIN)
        while len(self):
            left = end - time.monotonic()
            if left <= 0:
                return False
            heard.poll(left * 1000)
        return True

    def close(self) -> None:
        """Close the pipe; idempotent. The workers' reports reach nobody from then on."""
        self._saves.clear()
        pipes, self._reading, self._writing = (self._reading, self._writing), -1, -1
        for pipe in pipes:
            if pipe >= 0:
                os.close(pipe)

    def _hear(self) -> None:
        while self._saves and (reports := self._read()):
            for (number,) in _NUMBER.iter_unpack(reports):
                save = self._saves.get(number)
                if save is not None:
                    save.ranks -= 1
                    if not save.ranks:
                        del self._saves[number]
        lost_before = self._clock() - _LOST_SECONDS
        while self._saves and self._saves[oldest := next(iter(self._saves))].begun_at < lost_before:
            del self._saves[oldest]

    def _read(self) -> bytes:
        try:
            return os.read(self._reading, _READ_BYTES)  # a report is written at once: what is read is whole reports
        except BlockingIOError:
            return b""
