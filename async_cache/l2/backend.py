"""What a storage backend promises. `async_cache.testing` has the suite that holds one to it."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from enum import Enum

from msgspec import Struct

from async_cache.prompt.keys import ObjectKey
from async_cache.values import BackendUsage


class LoadOutcome(Enum):
    """What became of one object that was asked for."""

    LOADED = "loaded"
    GONE = "gone"
    CORRUPT = "corrupt"


class Limits(Struct, frozen=True, kw_only=True):
    """What one backend needs of time, where that differs from the settings of the cache; None: as they say."""

    lookup_timeout_seconds: float | None = None
    load_timeout_seconds: float | None = None
    store_timeout_seconds: float | None = None
    breaker_failures: int | None = None
    breaker_reset_seconds: float | None = None


class Backend(ABC):
    """Storage for objects.

    The caller guarantees that keys and buffers are of equal number, that a buffer is exactly as long as the object and
    is touched by nobody else until the call returns, and that `open` comes first and `close` last. Timeouts, retries
    and the circuit breaker are the caller's.

    The backend guarantees that it may be asked from many tasks at once, that it never holds the loop (what blocks
    runs in threads of its own), and that it touches buffers only until the call returns, cancelled or not.
    """

    name: str
    limits: Limits = Limits()
    """Its own timeouts and breaker; `lookup_timeout` and the like in a URL set them."""

    async def open(self) -> None:  # noqa: B027 (a backend without resources needs none)
        """Become ready to answer. Recovery of a large index goes on behind it."""

    @abstractmethod
    async def lookup(self, keys: Sequence[ObjectKey]) -> list[bool]:
        """For each key, whether the object is present; if so it is pinned until `unpin`.

        Pins count: an object found twice is unpinned twice. A call that raises, or is cancelled, has pinned nothing.
        """

    def lookup_nowait(self, chunk_hashes: Sequence[bytes], objects: Sequence[tuple[int, int]]) -> list[bool] | None:
        """For each chunk, whether all these objects, given as (rank, group), are present; if so they are pinned.

        None, and no pin, if that can not be said without waiting, or if a chunk has some of them only.
        """
        return None

    @abstractmethod
    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        """Give back one pin of each key. Objects that were removed meanwhile, or a closed backend, are no error."""

    @abstractmethod
    async def load(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[LoadOutcome]:
        """Fill each buffer with its object, verified. A CORRUPT object has been removed, and can be stored again.

        Raises BackendError if the storage failed; no buffer of the call is good then.
        """

    @abstractmethod
    async def store(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[bool]:
        """Store each object, whole or not at all; False where it was not stored. Storing what is there is True.

        Raises BackendError if the storage failed and nothing of the call was stored.
        """

    @abstractmethod
    async def delete(self, keys: Sequence[ObjectKey]) -> int:
        """Remove objects, pinned or not; the number that were there. What is stored again later has pins of its own."""

    @abstractmethod
    def keys(self) -> AsyncIterator[tuple[ObjectKey, int]]:
        """Every object with its size in bytes, for recovery and listing."""

    @abstractmethod
    def usage(self) -> BackendUsage:
        """What it holds, as far as it knows."""

    async def close(self) -> None:  # noqa: B027
        """Let go of threads and files; idempotent. Waits for calls that touch buffers, but not for a dead disk."""
