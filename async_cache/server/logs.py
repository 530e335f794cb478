"""The log, written by a thread: the server goes on where whoever reads it is slow, or hangs."""

import logging
import os
import queue
import select
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from async_cache.config import hide_password

_LINES = 10_000
_FLUSH_SECONDS = 1.0
_TELL_SECONDS = 0.2
_ABOUT = ("request_id", "tenant", "namespace", "backend")
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JSONFormatter(logging.Formatter):
    """An object in each line: time, level, logger, message, and what the event is about, if that is known."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without the passwords of URLs."""
        told = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": hide_password(record.getMessage().replace("\0", "/")),
        }
        about = {name: getattr(record, name) for name in _ABOUT if hasattr(record, name)}
        if "\0" in about.get("request_id", ""):  # as the cache of a server knows it
            about["tenant"], about["namespace"], about["request_id"] = about["request_id"].split("\0", 2)
        if "backend" in about:
            about["backend"] = hide_password(about["backend"])
        if record.exc_info:
            about["exception"] = hide_password(self.formatException(record.exc_info))
        return msgspec.json.encode(told | about).decode()


class ThreadedLog(logging.Handler):
    """Hands lines to a thread that writes them to a descriptor; what it has no room for is dropped and counted."""

    def __init__(self, descriptor: int, lines: int = _LINES):
        super().__init__()
        self._descriptor = descriptor
        self._lines: queue.Queue[str | None] = queue.Queue(lines)
        self._dropped = 0
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record, or drop it."""
        try:
            self._lines.put_nowait(self.format(record) + "\n")
        except queue.Full:
            self._dropped += 1
        except Exception:
            self.handleError(record)

    def finish(self, timeout_seconds: float) -> None:
        """Write what there is, for no longer than that."""
        try:
            self._lines.put(None, timeout=timeout_seconds)
        except queue.Full:
            return
        self._thread.join(timeout_seconds)

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            self._write(line)
            with self.lock or threading.Lock():  # which `emit` holds
                dropped, self._dropped = self._dropped, 0
            if dropped:
                self._write(f"{dropped} lines of the log were dropped: they were not read in time\n")

    def _write(self, text: str) -> None:
        _write_all(self._descriptor, text.encode(errors="backslashreplace"))


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            select.select([], [descriptor], [])
        except OSError:
            return  # nobody reads it any more


def say(descriptor: int, data: bytes) -> None:
    """Have a thread write this to a descriptor: who listens there may hang, or be gone."""
    threading.Thread(target=_write_all, args=(descriptor, data), name="say", daemon=True).start()


def tell(text: str) -> bool:
    """Write this to standard error; whether it was taken at once. Else a thread hangs there, who listens may do so."""
    telling = threading.Thread(target=sys.stderr.write, args=(text,), name="tell", daemon=True)
    telling.start()
    telling.join(_TELL_SECONDS)
    return not telling.is_alive()


@contextmanager
def log_to(descriptor: int, level: str, form: str = "text") -> Iterator[None]:
    """Have all that is logged, from this level on, written to a descriptor, as text or as "json"."""
    handler = ThreadedLog(descriptor)
    handler.setFormatter(JSONFormatter() if form == "json" else logging.Formatter(_FORMAT))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(level)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.finish(_FLUSH_SECONDS)
