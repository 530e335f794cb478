"""What a cache is asked for, noted in the loop in a microsecond and written by a thread, or dropped and counted."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from hashlib import blake2b
from pathlib import Path
from queue import Empty, SimpleQueue

import msgspec
from msgspec import Struct

from async_cache.errors import ConfigError
from async_cache.prompt.layout import Prompt
from async_cache.recording.rotation import RotatedFile
from async_cache.recording.trace import FORMAT, VERSION, Header, Hint, Line

log = logging.getLogger(__name__)

_MOST_WAITING = 2**18  # chunks: 20 MiB of digests, which a disk that hangs may keep
_GATHER_SECONDS = 0.05  # in which what comes is written together: each time, the thread takes the interpreter anew
_WRITTEN_AT_ONCE = 2**16  # bytes, or one line
_RETRY_SECONDS = 5.0
_QUIET_SECONDS = 60.0
_OPEN_SECONDS = 5.0
_CHUNK_TOKENS = 256  # of the header: requests with others say so


class _Noted(Struct, frozen=True, gc=False):
    """A request, or a hint, that was not written yet."""

    at_seconds: float
    tokens: int
    chunk_tokens: int
    chunk_hashes: list[bytes]
    hint: Hint | None


class Recorder:
    """Writes what it is told into a file of its own, by a thread: whoever tells it never waits for a disk.

    Of a chunk an id is written that depends on a secret, which only this recorder knows, and which ends with it. So
    nobody can tell from a file which tokens, salt or model an id stands for, nor whether a prompt that he knows is
    there. Of tenants, salts, models, clients and the time of day nothing is written.
    """

    def __init__(self, path: Path, most_bytes: int):
        self.path = path
        self.recorded = 0
        """Requests and hints that were written."""
        self.used_bytes = 0
        """What the files take."""
        self._most_bytes = most_bytes
        self._refused = self._failed = 0  # counted in the loop, and in the thread
        self._noted = self._done = 0  # chunks, the same way
        self._secret, self._run = os.urandom(32), os.urandom(8).hex()
        self._began = time.monotonic()
        self._queue: SimpleQueue[_Noted | None] = SimpleQueue()
        self._stopped = threading.Event()
        self._opened: Future[None] = Future()
        self._ended: Future[None] = Future()
        self._quiet_until = 0.0

    @property
    def dropped(self) -> int:
        """Requests and hints that were not written: the disk is too slow, hangs, or is full."""
        return self._refused + self._failed

    async def open(self) -> None:
        """Begin the file. Raises ConfigError where that cannot be done, or not in time."""
        for future in (self._opened, self._ended):
            future.set_running_or_notify_cancel()  # whoever waits may give up, and the thread goes on
        threading.Thread(target=self._run_thread, name="recording", daemon=True).start()
        try:
            async with asyncio.timeout(_OPEN_SECONDS):
                await asyncio.wrap_future(self._opened)
        except TimeoutError as error:
            self._stop()
            raise ConfigError(f"{self.path} cannot be written to within {_OPEN_SECONDS:g} s") from error
        except BaseException:
            self._stop()
            raise

    async def close(self, timeout_seconds: float) -> None:
        """Write what there is, for no longer than that; idempotent."""
        self._stop()
        await asyncio.wait([asyncio.wrap_future(self._ended)], timeout=timeout_seconds)

    def _stop(self) -> None:
        if not self._stopped.is_set():
            self._stopped.set()
            self._queue.put(None)

    # In the loop.

    def bound(self, most_bytes: int) -> None:
        """Keep to another bound from now on."""
        self._most_bytes = most_bytes

    def asked(self, prompt: Prompt) -> None:
        """Note a request for a prompt, whose hashes are known."""
        self._note(prompt, None)

    def hinted(
        self, prompt: Prompt, output_tokens: int | None, returns: bool | None, within_seconds: float | None
    ) -> None:
        """Note what an engine knows of the future of a prompt."""
        self._note(prompt, Hint(output_tokens, returns, within_seconds))

    def _note(self, prompt: Prompt, hint: Hint | None) -> None:
        if self._noted - self._done > _MOST_WAITING:
            self._refused += 1
            return
        hashes, at_seconds = prompt.chunk_hashes, time.monotonic() - self._began
        self._noted += len(hashes) + 1
        self._queue.put(_Noted(at_seconds, prompt.tokens, prompt.layout.chunk_tokens, hashes, hint))

    # In the thread.

    def _run_thread(self) -> None:
        try:
            header = msgspec.json.encode(Header(FORMAT, VERSION, _CHUNK_TOKENS, self._run)) + b"\n"
            try:
                file = RotatedFile(self.path, self._most_bytes, header)
            except OSError as error:
                raise ConfigError(f"{self.path} cannot be written to: {error.strerror}") from error
        except BaseException as error:
            self._opened.set_exception(error)
        else:
            self._opened.set_result(None)
            self._write_all(file)
        finally:
            self._ended.set_result(None)

    def _write_all(self, file: RotatedFile) -> None:
        try:
            while (first := self._queue.get()) is not None:
                self._stopped.wait(_GATHER_SECONDS)
                lines: list[bytes] = []
                size = 0
                for noted in self._waiting(first):
                    line = self._line(noted)
                    if size + len(line) > _WRITTEN_AT_ONCE:
                        self._write(file, lines)
                        lines, size = [], 0
                    lines.append(line)
                    size += len(line)
                self._write(file, lines)
        finally:
            file.close()

    def _waiting(self, noted: _Noted) -> Iterator[_Noted]:
        """One that was noted, and those that wait behind it."""
        while True:
            yield noted
            self._done += len(noted.chunk_hashes) + 1
            try:
                following = self._queue.get_nowait()
            except Empty:
                return
            if following is None:
                self._queue.put(None)  # the end: for who asks next
                return
            noted = following

    def _line(self, noted: _Noted) -> bytes:
        secret = self._secret  # with a digest, half a block: BLAKE2's own key would take a block, and time, of its own
        ids = [blake2b(secret + digest, digest_size=8).hexdigest() for digest in noted.chunk_hashes]
        chunk_tokens = noted.chunk_tokens if noted.chunk_tokens != _CHUNK_TOKENS else 0
        line = Line(round(noted.at_seconds, 3), noted.tokens, ids, None, chunk_tokens, noted.hint)
        return msgspec.json.encode(line) + b"\n"

    def _write(self, file: RotatedFile, lines: list[bytes]) -> None:
        file.most_bytes = self._most_bytes
        try:
            file.write(b"".join(lines))
            self.recorded += len(lines)
            self.used_bytes = file.used_bytes
        except (OSError, ConfigError) as error:
            self._failed += len(lines)
            if time.monotonic() >= self._quiet_until:
                log.warning("requests are not recorded to %s: %s", self.path, error)
                self._quiet_until = time.monotonic() + _QUIET_SECONDS
            self._stopped.wait(_RETRY_SECONDS)  # what comes meanwhile waits, or is dropped
