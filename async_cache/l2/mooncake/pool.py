"""Records in the pool, by Mooncake's client. Everything here blocks, and runs in the helper's threads.

A value is a record of `l2.record`. Its body lies where the caller wants it, its trailer in memory of the thread: the
client scatters and gathers, so nothing is copied.
"""

import ctypes
import time
from collections.abc import Sequence
from itertools import count
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
MOST_LISTINGS = 8  # at a time

# Of Mooncake's `ErrorCode`.
TOO_LARGE = -600  # an invalid argument: here, a value that is longer than its room
OBJECT_NOT_FOUND = -704
TRANSFER_FAILED = -800  # also where the value is shorter than its room

_, GONE, CORRUPT, FAILED = (outcome.value for outcome in LoadOutcome)


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
        self._listings: dict[int, list[ObjectKey]] = {}
        self._numbers = count()

    def find(self, keys: Sequence[ObjectKey]) -> list[int]:
        """For each object 1, and a lease of the master's, or 0, or a negative error."""
        return list(self._client.batch_is_exist(self._names(keys))) if keys else []

    def load(self, keys: Sequence[ObjectKey], places: Sequence[Place], may_be_shorter: bool) -> list[int | str]:
        """Read objects and verify them. Returns the bytes of each, or the values of other LoadOutcomes."""
        read = self._load_shorter if may_be_shorter else self._load
        told: list[int | str] = []
        step = PIECE_OBJECTS if len(set(keys)) == len(keys) else 1  # of equal names in a call, the client fills one
        for begin in range(0, len(keys), step):
            piece = slice(begin, begin + step)
            told += read(keys[piece], places[piece])
        return told

    def _load(self, keys: Sequence[ObjectKey], places: Sequence[Place]) -> list[int | str]:
        """Read objects that are as long as their places, body and trailer each to where it belongs."""
        trailers, base = self._own_trailers()
        begin = time.monotonic()
        codes = self._client.batch_get_into_multi_buffers(self._names(keys), *self._gathered(places, base))
        self._end_if_given_up(codes, begin)
        return [
            self._told(key, place, trailers[n * TRAILER_BYTES : (n + 1) * TRAILER_BYTES], code)
            for n, (key, place, code) in enumerate(zip(keys, places, codes, strict=True))
        ]

    def _load_shorter(self, keys: Sequence[ObjectKey], places: Sequence[Place]) -> list[int | str]:
        """Read objects that may be shorter than their places: whole, or by their sizes where that has no room."""
        begin = time.monotonic()
        addresses = [self._bases[file] + offset for file, offset, _ in places]
        codes = self._client.batch_get_into(self._names(keys), addresses, [place.size_bytes for place in places])
        self._end_if_given_up(codes, begin)
        told = list(map(self._told_whole, keys, places, codes))
        tight = [n for n, code in enumerate(codes) if code == TOO_LARGE]
        sizes = self._measure([keys[n] for n in tight])
        fitting = {n: size for n, size in zip(tight, sizes, strict=True) if 0 <= size <= places[n].size_bytes}
        exact = [places[n]._replace(size_bytes=size) for n, size in fitting.items()]
        for n, outcome in zip(fitting, self._load([keys[n] for n in fitting], exact) if fitting else (), strict=True):
            told[n] = outcome
        return told

    def _end_if_given_up(self, codes: Sequence[int], begin: float) -> None:
        if TRANSFER_FAILED in codes and time.monotonic() - begin >= ENGINE_TIMEOUT_SECONDS:
            _exit(1)  # nothing else ends a transfer that the engine gave up: it would write to memory of others

    def _told_whole(self, key: ObjectKey, place: Place, code: int) -> int | str:
        """What became of an object whose record was read to the beginning of its place."""
        body = body_bytes(code) if code >= 0 else None
        if body is None:
            return CORRUPT if code >= 0 or code == TOO_LARGE else GONE if code == OBJECT_NOT_FOUND else FAILED
        file = self._files[place.file]
        assert file is not None
        trailer = memoryview(file)[place.offset + body : place.offset + code]
        whole = is_trailer(trailer, key, body, self._checksum(place._replace(size_bytes=body)))
        return body if whole else CORRUPT

    def _told(self, key: ObjectKey, place: Place, trailer: memoryview, code: int) -> int | str:
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
        return place.size_bytes if whole else CORRUPT

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

    def list_all(self, url: str) -> tuple[int, int]:
        """List the namespace, as the master's HTTP server, at this URL, does. Raises OSError.

        Returns the number of the listing, and of how many objects it is.
        """
        with urlopen(url, timeout=LIST_SECONDS) as lines:
            names = (line.decode(errors="replace").rstrip("\n") for line in lines)
            keys = [parse_name(name[len(self._prefix) :]) for name in names if name.startswith(self._prefix)]
        if len(self._listings) == MOST_LISTINGS:  # the first of them was left in the middle
            del self._listings[next(iter(self._listings))]
        number = next(self._numbers)
        self._listings[number] = listing = [key for key in keys if key is not None]
        return number, len(listing)

    def page(self, number: int, begin: int, count: int) -> list[tuple[bytes, int, int, int]]:
        """Some objects of a listing, each with the size of its body in bytes. Raises ValueError where it has ended."""
        if number not in self._listings:
            raise ValueError("too many listings were begun after this one")
        keys = self._listings[number][begin : begin + count]
        if begin + count >= len(self._listings[number]):
            del self._listings[number]
        return [(*key, size) for key, size in zip(keys, self._measure(keys), strict=True) if size >= 0]

    def _measure(self, keys: Sequence[ObjectKey]) -> list[int]:
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
