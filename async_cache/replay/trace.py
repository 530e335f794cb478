"""The requests of a recording, as they are in a file: Mooncake's format, or our own.

Both have a JSON object on each line, and may be compressed with gzip. Mooncake's (the traces of FAST'25) have no
header, and 512 tokens a chunk:

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 2353, 2354]}

Ours begins with a line that says what it is:

    {"format": "async-cache trace", "version": 1, "chunk_tokens": 256}
    {"at": 27.482, "tokens": 6955, "output_tokens": 52, "chunks": ["1f0c…", "93ab…"], "tenant": "", "model": ""}

`at` and `timestamp` are the time since the beginning, in seconds and in milliseconds. Ids stand for the tokens of a
chunk and of all before it: two requests have one in common as far as they have a prefix in common. `output_tokens`,
`tenant` and `model` may be absent. A last chunk may be shorter than others.
"""

import gzip
import json
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, TextIO

from msgspec import Struct

from async_cache.errors import ConfigError

FORMAT = "async-cache trace"
VERSION = 1
MOONCAKE_CHUNK_TOKENS = 512


class TracedRequest(Struct, frozen=True, gc=False):
    """One request of a trace. `path`: the hash of each of its chunks, 32 bytes."""

    at_seconds: float
    tokens: int
    output_tokens: int | None
    path: list[bytes]


class Trace(Struct, frozen=True):
    """All requests of a trace, in the order of their times."""

    requests: list[TracedRequest]
    chunk_tokens: int

    def chunk_sizes(self, request: TracedRequest) -> list[int]:
        """The tokens of each chunk of a request: the last one may be shorter."""
        full = [self.chunk_tokens] * len(request.path)
        full[-1:] = [request.tokens - self.chunk_tokens * (len(full) - 1)] * (len(full) > 0)
        return full


def read_trace(path: Path) -> Trace:
    """Read a trace of either format. Raises ConfigError, with the number of the line, where it is neither."""
    hashes: dict[tuple[bytes, object], bytes] = {}
    requests: list[TracedRequest] = []
    chunk_tokens = MOONCAKE_CHUNK_TOKENS
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    fields = json.loads(line)
                    if number == 1 and "format" in fields:
                        chunk_tokens = _header(fields)
                        continue
                    requests.append(_request(fields, chunk_tokens, hashes))
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    raise ConfigError(f"{path}, line {number}: not a request of a trace: {error}") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not requests:
        raise ConfigError(f"{path} has no requests")
    requests.sort(key=lambda request: request.at_seconds)
    return Trace(requests, chunk_tokens)


def _open(path: Path) -> TextIO:
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rt", encoding="utf-8") if compressed else path.open(encoding="utf-8")


def _header(fields: dict[str, Any]) -> int:
    if fields["format"] != FORMAT or fields["version"] != VERSION:
        raise ValueError(f"{fields['format']!r} of version {fields['version']} is another format than {FORMAT!r}, 1")
    return _at_least(1, fields["chunk_tokens"])


def _request(fields: dict[str, Any], chunk_tokens: int, hashes: dict[tuple[bytes, object], bytes]) -> TracedRequest:
    if "hash_ids" in fields:
        at, tokens, output, ids = (
            fields["timestamp"] / 1000,
            fields["input_length"],
            fields.get("output_length"),
            fields["hash_ids"],
        )
    else:
        at, tokens, output, ids = fields["at"], fields["tokens"], fields.get("output_tokens"), fields["chunks"]
    if not 0 <= at < float("inf"):
        raise ValueError(f"{at} is no time")
    _at_least(0, tokens)
    if not chunk_tokens * (len(ids) - 1) < tokens or tokens >= chunk_tokens * (len(ids) + 1):
        raise ValueError(f"{tokens} tokens are not {len(ids)} chunks of {chunk_tokens}")
    path, parent = [], repr((fields.get("tenant", ""), fields.get("model", ""))).encode()
    for chunk in ids:
        known = hashes.get((parent, chunk))
        if known is None:
            known = hashes[parent, chunk] = blake2b(parent + repr(chunk).encode(), digest_size=32).digest()
        path.append(parent := known)
    return TracedRequest(float(at), tokens, output if output is None else _at_least(0, output), path)


def _at_least(least: int, value: Any) -> int:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{value!r} is not a whole number of at least {least}")
    return value


def lines(trace: Trace) -> Iterator[str]:
    """The lines of a trace in our own format."""
    yield json.dumps({"format": FORMAT, "version": VERSION, "chunk_tokens": trace.chunk_tokens})
    for request in trace.requests:
        chunks = [chunk_hash[:8].hex() for chunk_hash in request.path]
        fields = {"at": request.at_seconds, "tokens": request.tokens, "chunks": chunks}
        yield json.dumps(fields if request.output_tokens is None else fields | {"output_tokens": request.output_tokens})
