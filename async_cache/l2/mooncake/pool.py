"""Records in the pool, by Mooncake's client. Everything here blocks, and runs in the helper's threads.

A value is a record of `l2.record`. Its body lies where the caller wants it, its trailer in memory of the thread: the
client scatters and gathers, so nothing is copied.
"""

import ctypes
import time
from collections.abc import Sequence
from mmap import mmap
from os import _exit
from threading import local
from urllib.request import urlopen

from mooncake.store import MooncakeDistributedStore, ReplicateConfig
from xxhash import xxh3_64_intdigest

from async_cache.l2.backend import LoadOutcome
from async_cache.l2.mooncake.calls import Place
from async_cache.l2.record import TRAILER_BYTES, body_bytes, file_name, is_trailer, parse_name, write_trailer
from async_cache.prompt.keys import ObjectKey

PIECE_OBJECTS = 1024  # in one call of the client; a thread has as many trailers
ENGINE_TIMEOUT_SECONDS = 60.0  # after which the engine gives a transfer up, which may go on all the same
LIST_SECONDS = 30.0

# Of Mooncake's `ErrorCode`.
TOO_LARGE = -600  # an invalid argument: here, a value that is longer than its room
OBJECT_NOT_FOUND = -704
TRANSFER_FAILED = -800  # also where the value is shorter than its room

LOADED, GONE, CORRUPT, FAILED = (outcome.value for outcome in LoadOutcome)


class Pool:
    """The objects of one namespace, read to and written from memory files that are mapped here."""

    def __init__(self, client: MooncakeDistributedStore, namespace: str, files: Sequence[mmap | None], replicas: int):
        self._client = client
        self._prefix = f"{namespace}/"
        self._files = files
        self._bases = [address(file) if file is not None else 0 for file in files]
        self._config = ReplicateConfig()
        self._config.replica_num = replicas
        self._trailers = local()

    def find(self, keys: Sequence[ObjectKey]) -> list[int]:
        """For each object 1, and a lease of the master's, or 0, or a negative error."""
        return list(self._client.batch_is_exist(self._names(keys))) if keys else []

    def load(self, keys: Sequence[ObjectKey], places: Sequence[Place]) -> list[str]:
        """Read objects and verify them; what is damaged is removed. Returns the values of LoadOutcomes."""
        outcomes: list[str] = []
        step = PIECE_OBJECTS if len(set(keys)) == len(keys) else 1  # of equal names in a call, the client fills one
        for begin in range(0, len(keys), step):
            piece = slice(begin, begin + step)
            outcomes += self._load(keys[piece], places[piece])
        damaged = [key for key, outcome in zip(keys, outcomes, strict=True) if outcome == CORRUPT]
        self.remove(damaged)
        return outcomes

    def _load(self, keys: Sequence[ObjectKey], places: Sequence[Place]) -> list[str]:
        trailers, base = self._own_trailers()
        begin = time.monotonic()
        codes = self._client.batch_get_into_multi_buffers(self._names(keys), *self._gathered(places, base))
        if TRANSFER_FAILED in codes and time.monotonic() - begin >= ENGINE_TIMEOUT_SECONDS:
            _exit(1)  # nothing else ends a transfer that the engine gave up: it would write to memory of others
        return [
            self._outcome(key, place, trailers[n * TRAILER_BYTES : (n + 1) * TRAILER_BYTES], code)
            for n, (key, place, code) in enumerate(zip(keys, places, codes, strict=True))
        ]

    def _outcome(self, key: ObjectKey, place: Place, trailer: memoryview, code: int) -> str:
        if code == OBJECT_NOT_FOUND:
            return GONE
        record_bytes = place.size_bytes + TRAILER_BYTES
        if code in (TOO_LARGE, TRANSFER_FAILED):  # of another size, perhaps
            size_bytes = self._client.get_size(self._name(key))
            if size_bytes == OBJECT_NOT_FOUND:
                return GONE
            return CORRUPT if size_bytes >= 0 and size_bytes != record_bytes else FAILED
        if code < 0:
            return FAILED
        whole = code == record_bytes and is_trailer(trailer, key, place.size_bytes, self._checksum(place))
        return LOADED if whole else CORRUPT

    def store(self, keys: Sequence[ObjectKey], places: Sequence[Place], replaced: Sequence[ObjectKey]) -> list[int]:
        """Write objects, each whole or not at all; the codes of the client, 0 also for what is there."""
        self.remove(replaced)
        codes: list[int] = []
        for begin in range(0, len(keys), PIECE_OBJECTS):
            piece = slice(begin, begin + PIECE_OBJECTS)
            codes += self._store(keys[piece], places[piece])
        return codes

    def _store(self, keys: Sequence[ObjectKey], places: Sequence[Place]) -> list[int]:
        trailers, base = self._own_trailers()
        for n, (key, place) in enumerate(zip(keys, places, strict=True)):
            write_trailer(trailers[n * TRAILER_BYTES :], key, place.size_bytes, self._checksum(place))
        return list(
            self._client.batch_put_from_multi_buffers(self._names(keys), *self._gathered(places, base), self._config)
        )

    def remove(self, keys: Sequence[ObjectKey]) -> list[int]:
        """Remove objects, leased or not: 0 for what was there."""
        return list(self._client.batch_remove(self._names(keys), True)) if keys else []

    def list_all(self, url: str) -> list[ObjectKey]:
        """The objects of the namespace, as the master's HTTP server, at this URL, lists them. Raises OSError."""
        with urlopen(url, timeout=LIST_SECONDS) as lines:
            names = (line.decode(errors="replace").rstrip("\n") for line in lines)
            keys = [parse_name(name[len(self._prefix) :]) for name in names if name.startswith(self._prefix)]
        return [key for key in keys if key is not None]

    def measure(self, keys: Sequence[ObjectKey]) -> list[int]:
        """The size of each body in bytes; negative where there is no such object."""
        sizes = [self._client.get_size(self._name(key)) for key in keys]
        return [-1 if size < 0 or (body := body_bytes(size)) is None else body for size in sizes]

    # Names and memory.

    def _name(self, key: ObjectKey) -> str:
        return self._prefix + file_name(key)

    def _names(self, keys: Sequence[ObjectKey]) -> list[str]:
        return [self._prefix + file_name(key) for key in keys]

    def _gathered(self, places: Sequence[Place], trailers: int) -> tuple[list[list[int]], list[list[int]]]:
        """For each object, the addresses of its body and its trailer, and their sizes."""
        addresses = [
            [self._bases[file] + offset, trailers + n * TRAILER_BYTES] for n, (file, offset, _) in enumerate(places)
        ]
        return addresses, [[place.size_bytes, TRAILER_BYTES] for place in places]

    def _checksum(self, place: Place) -> int:
        file = self._files[place.file]
        assert file is not None
        return xxh3_64_intdigest(memoryview(file)[place.offset : place.offset + place.size_bytes])

    def _own_trailers(self) -> tuple[memoryview, int]:
        """Memory for the trailers of one piece, of this thread, and its address."""
        if not hasattr(self._trailers, "memory"):
            memory = mmap(-1, PIECE_OBJECTS * TRAILER_BYTES)
            self._trailers.base = address(memory)
            self._client.register_buffer(self._trailers.base, len(memory))
            self._trailers.memory = memoryview(memory)
        return self._trailers.memory, self._trailers.base


def address(memory: mmap) -> int:
    """Where a mapping begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
