"""The helper as this process sees it: calls, their answers, and its end. See `helper` for its own side."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from typing import Any, Self

import msgspec

from async_cache.aio.ending import to_its_end
from async_cache.errors import BackendError, ConfigError
from async_cache.l2.mooncake.calls import LENGTH, Answer, Call, Close, Request

CLOSE_SECONDS = 1.8  # for leaving the pool; then the process is killed
QUIET = {
    "MC_LOG_LEVEL": "ERROR",
    "MC_RPC_TIMEOUT_MS": "2000",  # of a master that is silent; the library has 30 s
    "MC_RPC_CONNECT_TIMEOUT_MS": "1000",
}
"""The environment of the helper, where the user's says nothing else."""


class HelperProcess:
    """A running helper. Once it has ended, whatever it was asked fails, and it touches no memory any more."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, reader: Any, writer: asyncio.StreamWriter):
        self._name = name
        self._process = process
        self._reader: asyncio.StreamReader = reader
        self._writer = writer
        self._numbers = count()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._decode = msgspec.msgpack.Decoder(Answer).decode
        self._reading = asyncio.create_task(self._read(), name=f"{name} answers")

    @classmethod
    async def start(cls, name: str, files: Sequence[tuple[int, int]]) -> Self:
        """Start a helper that maps these memory files, each given by its descriptor and size."""
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "async_cache.l2.mooncake.helper",
                str(theirs.fileno()),
                *(f"{fd}:{size_bytes}" for fd, size_bytes in files),
                pass_fds=(theirs.fileno(), *(fd for fd, _ in files)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=None if "MC_LOG_LEVEL" in os.environ else asyncio.subprocess.DEVNULL,
                stderr=None if "MC_LOG_LEVEL" in os.environ else asyncio.subprocess.DEVNULL,
                env=QUIET | os.environ,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        try:
            reader, writer = await asyncio.open_unix_connection(sock=ours)
        except BaseException:
            ours.close()
            _kill(process)
            await process.wait()
            raise
        return cls(name, process, reader, writer)

    @property
    def has_ended(self) -> bool:
        """Whether nothing more can be asked."""
        return self._reading.done()

    async def ask(self, call: Call) -> Any:
        """What the helper answers. Raises BackendError where it fails, or ends; ConfigError where it cannot work.

        It touches memory until then: a cancel is raised when the answer has come.
        """
        if self.has_ended:
            raise BackendError(f"{self._name}: the helper has ended")
        number = next(self._numbers)
        frame = msgspec.msgpack.encode(Request(number, call))
        self._writer.write(LENGTH.pack(len(frame)) + frame)
        future = self._calls[number] = asyncio.get_running_loop().create_future()
        return (await to_its_end(future)).result()

    async def _read(self) -> None:
        try:
            while True:
                (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
                self._answered(self._decode(await self._reader.readexactly(length)))
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            _kill(self._process)
            await self._process.wait()  # only then it touches nothing any more
            self._writer.close()
            for future in self._calls.values():
                if not future.done():
                    future.set_exception(BackendError(f"{self._name}: the helper has ended"))
                    future.exception()
            self._calls.clear()

    def _answered(self, answer: Answer) -> None:
        future = self._calls.pop(answer.number)
        if answer.error is None:
            future.set_result(answer.result)
        elif answer.usage:
            future.set_exception(ConfigError(f"{self._name}: {answer.error}"))
        else:
            future.set_exception(BackendError(f"{self._name}: {answer.error}"))

    async def close(self) -> None:
        """Let the client leave the pool, then end the process, at the latest by killing it."""
        closing = asyncio.ensure_future(self.ask(Close()))
        try:
            await asyncio.wait((closing,), timeout=CLOSE_SECONDS)
        finally:
            await self.kill()
        with suppress(BackendError):
            await closing

    async def kill(self) -> None:
        """End the process now, and wait until it has.

        Its answers end with it. They are not cancelled: before their first step nobody would be told, nor at their end.
        """
        _kill(self._process)
        await self._process.wait()
        self._reader.feed_eof()  # a child of ours may have inherited the socket
        await asyncio.wait((self._reading,))


def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.kill(
                process.pid, signal.SIGKILL
            )  # `process.kill` would reap it, before asyncio's thread that waits does
