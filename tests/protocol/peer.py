"""A real server process, and peers that speak to it over bare sockets."""

import fcntl
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from server.programs import busy_seconds, environment

from async_cache.protocol import messages as m
from async_cache.protocol.frames import FrameReader, frame
from async_cache.protocol.messages import VERSION, Decoder, encode

TIMEOUT_SECONDS = 100
F_ADD_SEALS, F_SEAL_SHRINK, F_SEAL_GROW = 1033, 0x2, 0x4
L1_BYTES = 16 * 2**20
FAULTS = re.compile(r"Traceback|could not be handled|failed|exception|ERROR|CRITICAL|never retrieved|never awaited")

_greetings = Decoder(m.Welcome | m.Failed)
_answers = Decoder(m.Answer)


@dataclass
class Served:
    """A server process: its socket, and what it has logged."""

    process: "subprocess.Popen[bytes]"
    path: str
    log: Path

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"unix://{self.path}"

    def busy_seconds(self) -> float:
        return busy_seconds(self.process.pid)

    def faults(self) -> list[str]:
        """The lines of its log that tell of a defect."""
        return [line for line in self.log.read_text().splitlines() if FAULTS.search(line)]


@contextmanager
def serving(l2: str = "memory://", config: str = "") -> Iterator[Served]:
    """A server, from its first moment to its last; it has to end in order."""
    with tempfile.TemporaryDirectory(prefix="ac-") as directory:
        path, log, settings = f"{directory}/s", Path(directory, "log"), Path(directory, "config.toml")
        settings.write_text(config)
        command = [
            sys.executable,
            "-m",
            "async_cache",
            "serve",
            "--config",
            str(settings),
            "--listen",
            f"unix://{path}",
        ]
        command += ["--l2", l2, "--l1-bytes", str(L1_BYTES)]
        environ = environment()
        with log.open("wb") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environ)
        try:
            assert process.stdout is not None
            started = any(line.startswith(b"serving at") for line in process.stdout)
            assert started, log.read_text()
            yield Served(process, path, log)
            process.terminate()
            assert process.wait(TIMEOUT_SECONDS) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def memory(size_bytes: int) -> int:
    """A file descriptor of memory as a client's segment is to be: it can not be cut short any more."""
    segment = os.memfd_create("segment", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(segment, size_bytes)
    fcntl.fcntl(segment, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW)
    return segment


class Peer:
    """One end of a connection, blocking. `send` takes messages or bytes, `until` reads up to an answer or the end."""

    def __init__(self, path: str, hello: m.Hello | None = None, segment: int | None = None):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT_SECONDS)
        self.sock.connect(path)
        self.closed = False
        self.answers: list[Any] = []
        self.arena: int | None = None
        self._frames = FrameReader()
        self._numbers = iter(range(10**9, 2 * 10**9))
        if hello is not None:
            welcome = self.greet(hello, segment)
            assert isinstance(welcome, m.Welcome), welcome

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the socket, and of the arena."""
        self.sock.close()
        if self.arena is not None:
            os.close(self.arena)

    def greet(self, hello: m.Hello, segment: int | None = None) -> m.Welcome | m.Failed:
        """Say hello, with the file descriptor of a segment beside it; what the server says."""
        data = frame(encode(hello))
        if segment is None:
            self.sock.sendall(data)
        else:
            socket.send_fds(self.sock, [data], [segment])
        header, descriptors, _, _ = socket.recv_fds(self.sock, 4, 1)
        self.arena = descriptors[0] if descriptors else None
        answer: m.Welcome | m.Failed = _greetings.decode(
            self.sock.recv(int.from_bytes(header, "little"), socket.MSG_WAITALL)
        )
        return answer

    def send(self, *parts: Any) -> None:
        """Send messages, or bytes as they are. Where the server has closed, nothing is sent."""
        data = b"".join(part if isinstance(part, bytes) else frame(encode(part)) for part in parts)
        try:
            self.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return

    def end(self) -> list[Any]:
        """Send no more; all answers up to the end of the connection."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        return self._read(None)

    def until(self, number: int) -> list[Any]:
        """All answers up to that of this number, or the end."""
        return self._read(number)

    def ask(self, *parts: Any) -> list[Any]:
        """Send, and a ping behind it; all answers up to that of the ping, which is left out, or the end."""
        number = next(self._numbers)
        self.send(*parts, m.Ping(number))
        answers = self.until(number)
        return [answer for answer in answers if answer.number != number]

    def _read(self, number: int | None) -> list[Any]:
        begin = len(self.answers)
        while not self.closed and not any(answer.number == number for answer in self.answers[begin:]):
            try:
                data = self.sock.recv(2**18)
            except ConnectionResetError:
                data = b""
            if data:
                self.answers += map(_answers.decode, self._frames.feed(data))
            else:
                self.closed = True
        return self.answers[begin:]


HELLO = m.Hello(VERSION)


def codes(answers: Sequence[Any]) -> list[tuple[int, str]]:
    """(number, code) of those that tell of an error."""
    return [(answer.number, answer.code) for answer in answers if isinstance(answer, m.Failed)]
