"""A command in a pseudo-terminal, and what its screen shows."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyte

SECONDS = 100


class Terminal:
    """A terminal in which a command runs."""

    def __init__(self, master: int, process: "subprocess.Popen[bytes]", columns: int, lines: int):
        self.process = process
        self.heard = b""
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self._master = master

    @property
    def text(self) -> str:
        """What it shows now."""
        return "\n".join(line.rstrip() for line in self.screen.display)

    def until(self, wanted: Callable[[str], bool]) -> str:
        """Wait until it shows what is wanted, and return all that it shows."""
        deadline = time.monotonic() + SECONDS
        while not wanted(self.text):
            assert time.monotonic() < deadline, self.text
            self._read(0.1)
        return self.text

    def press(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def end(self) -> int:
        """The exit code of the command, which ends."""
        deadline = time.monotonic() + SECONDS
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.text
            self._read(0.1)
        while self._read(0):
            pass
        return self.process.returncode

    def _read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], seconds)
        if not ready:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # nobody has the other end open any more
            return False
        self.heard += data
        self._stream.feed(data)
        return bool(data)


@contextmanager
def terminal(
    command: Sequence[str],
    directory: Path,
    environment: Mapping[str, str],
    columns: int = 120,
    lines: int = 40,
    kind: str = "xterm-256color",
) -> Iterator[Terminal]:
    """Run a command in a terminal of this size; it is killed in the end."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    kept = {name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        command,
        cwd=directory,
        env={**kept, "TERM": kind},
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(slave)
    try:
        yield Terminal(master, process, columns, lines)
    finally:
        process.kill()
        process.wait()
        os.close(master)
