"""The requests of a recording, as they are in a file: Mooncake's format, or our own.

Both have a JSON object on each line, and may be compressed with gzip. `docs/traces.md` tells every field. Ids stand for
the tokens of a chunk and of all before it: two requests have one in common as far as they have a prefix in common.
"""

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from heapq import merge
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any, TextIO

import msgspec
from msgspec import Struct, field

from async_cache.errors import ConfigError

FORMAT = "async-cache trace"
VERSION = 1
MOONCAKE_CHUNK_TOKENS = 512


class Header(Struct, frozen=True, omit_defaults=True):
    """The first line of our own format. `run`: the ids in files of one run are comparable, and no others."""

    format: str
    version: int
    chunk_tokens: int
    run: str = ""


class Hint(Struct, frozen=True, omit_defaults=True, gc=False):
    """What an engine has told of the future of a path: see `AsyncCache.hint`."""

    output_tokens: int | None = None
    returns: bool | None = None
    within_seconds: float | None = None


class Line(Struct, frozen=True, omit_defaults=True, gc=False):
    """Any other line: a request, or a hint at what comes after one. `chunk_tokens` 0: those of the header."""

    at: float
    tokens: int
    chunks: list[str]
    output_tokens: int | None = None
    chunk_tokens: int = 0
    hint: Hint | None = None


class TracedRequest(Struct, frozen=True, gc=False):
    """One request of a trace. `path`: the hash of each of its chunks, 32 bytes. The last may be shorter than others."""

    at_seconds: float
    tokens: int
    output_tokens: int | None
    path: list[bytes]
    chunk_tokens: int

    def chunk_sizes(self) -> list[int]:
        """The tokens of each chunk."""
        full = [self.chunk_tokens] * len(self.path)
        full[-1:] = [min(self.chunk_tokens, self.tokens - self.chunk_tokens * (len(full) - 1))] * (len(full) > 0)
        return full


class TracedHint(Struct, frozen=True, gc=False):
    """A hint of a trace, at a path that was asked for before."""

    at_seconds: float
    tokens: int
    path: list[bytes]
    chunk_tokens: int
    hint: Hint


class Trace(Struct, frozen=True):
    """All requests of a trace, and all hints, each in the order of their times."""

    requests: list[TracedRequest]
    hints: list[TracedHint] = field(default_factory=list)

    @property
    def chunk_tokens(self) -> int:
        """Those of its longest chunks."""
        return max(request.chunk_tokens for request in self.requests)


def read_trace(*paths: Path) -> Trace:
    """Read a trace of either format, from one file or from all of one run.

    Raises ConfigError, with the number of the line, where a file is of neither. A last line that has no end may be one
    that is being written: it is left out.
    """
    requests: list[TracedRequest] = []
    hints: list[TracedHint] = []
    hashes: dict[tuple[bytes, object], bytes] = {}
    runs = []
    for path in paths:
        file = _File(path, hashes)
        for event in file.events():
            if isinstance(event, TracedRequest):
                requests.append(event)
            else:
                hints.append(event)
        runs.append(file.run)
    for (path, run), (other, another) in pairwise(zip(paths, runs, strict=True)):
        if run != another or not run:
            raise ConfigError(f"{path} and {other} are not of one recording: their ids say nothing of each other")
    if not requests:
        raise ConfigError(f"{paths[0]} has no requests")
    for events in (requests, hints):
        events.sort(key=attrgetter("at_seconds"))
    return Trace(requests, hints)


class _File:
    """One file of a trace, as far as it was read."""

    def __init__(self, path: Path, hashes: dict[tuple[bytes, object], bytes]):
        self._path, self._hashes = path, hashes
        self._chunk_tokens = MOONCAKE_CHUNK_TOKENS
        self.run = ""

    def events(self) -> Iterator[TracedRequest | TracedHint]:
        """What is on its lines. Raises ConfigError."""
        try:
            with _open(self._path) as file:
                for number, line in enumerate(file, 1):
                    try:
                        event = self._event(line, is_first=number == 1) if line.strip() else None
                    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                        if number > 1 and not line.endswith("\n"):
                            return
                        where = f"{self._path}, line {number}"
                        raise ConfigError(f"{where}: not a request of a trace: {error}") from error
                    if event is not None:
                        yield event
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self._path} cannot be read: {error}") from error

    def _event(self, line: str, *, is_first: bool) -> TracedRequest | TracedHint | None:
        fields = json.loads(line)
        if is_first and "format" in fields:
            self._chunk_tokens, self.run = _header(fields)
            return None
        if "hash_ids" in fields:
            at, tokens, ids = fields["timestamp"] / 1000, fields["input_length"], fields["hash_ids"]
            output = fields.get("output_length")
        else:
            at, tokens, ids = fields["at"], fields["tokens"], fields["chunks"]
            output = fields.get("output_tokens")
        if not 0 <= at < float("inf"):
            raise ValueError(f"{at} is no time")
        _at_least(0, tokens)
        chunk_tokens = _at_least(1, fields.get("chunk_tokens", self._chunk_tokens))
        if not chunk_tokens * (len(ids) - 1) < tokens or tokens >= chunk_tokens * (len(ids) + 1):
            raise ValueError(f"{tokens} tokens are not {len(ids)} chunks of {chunk_tokens}")
        path = self._path_of(ids, repr((fields.get("tenant", ""), fields.get("model", ""))).encode())
        if "hint" in fields:
            return TracedHint(float(at), tokens, path, chunk_tokens, msgspec.convert(fields["hint"], Hint))
        return TracedRequest(float(at), tokens, output if output is None else _at_least(0, output), path, chunk_tokens)

    def _path_of(self, ids: Sequence[object], root: bytes) -> list[bytes]:
        """A hash for each id and all before it."""
        path, parent, hashes = [], root, self._hashes
        for chunk in ids:
            known = hashes.get((parent, chunk))
            if known is None:
                known = hashes[parent, chunk] = blake2b(parent + repr(chunk).encode(), digest_size=32).digest()
            path.append(parent := known)
        return path


def _open(path: Path) -> TextIO:
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rt", encoding="utf-8-sig") if compressed else path.open(encoding="utf-8-sig")


def _header(fields: dict[str, Any]) -> tuple[int, str]:
    if fields["format"] != FORMAT or fields["version"] != VERSION:
        raise ValueError(f"{fields['format']!r} of version {fields['version']} is another format than {FORMAT!r}, 1")
    run = fields.get("run", "")
    if not isinstance(run, str):
        raise ValueError(f"{run!r} is no run")
    return _at_least(1, fields["chunk_tokens"]), run


def _at_least(least: int, value: Any) -> int:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{value!r} is not a whole number of at least {least}")
    return value


def lines(trace: Trace) -> Iterator[str]:
    """The lines of a trace in our own format."""
    usual = trace.requests[0].chunk_tokens if trace.requests else MOONCAKE_CHUNK_TOKENS
    yield msgspec.json.encode(Header(FORMAT, VERSION, usual)).decode()
    events: Iterable[TracedRequest | TracedHint] = merge(trace.requests, trace.hints, key=attrgetter("at_seconds"))
    for event in events:
        ids = [chunk_hash[:8].hex() for chunk_hash in event.path]
        chunk_tokens = event.chunk_tokens if event.chunk_tokens != usual else 0
        if isinstance(event, TracedRequest):
            line = Line(event.at_seconds, event.tokens, ids, event.output_tokens, chunk_tokens)
        else:
            line = Line(event.at_seconds, event.tokens, ids, None, chunk_tokens, event.hint)
        yield msgspec.json.encode(line).decode()
