"""What a storage backend promises. `async_cache.testing` has the suite that holds one to it."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from enum import Enum

from msgspec import Struct

from async_cache.config import CacheConfig
from async_cache.l2.placement import Placement
from async_cache.prompt.keys import ObjectKey
from async_cache.values import BackendUsage, Removal


def nobody_listens(chunk_hash: bytes, removal: Removal) -> None:
    """What a backend that no cache uses has to tell."""


class LoadOutcome(Enum):
    """What became of one object that was to be loaded.

    LOADED: its buffer has the verified bytes. GONE: it is not there. CORRUPT: what was stored failed verification.
    FAILED: it could not be read now, whatever else of the call was.
    """

    LOADED = "loaded"
    GONE = "gone"
    CORRUPT = "corrupt"
    FAILED = "failed"


class Limits(Struct, frozen=True, kw_only=True):
    """What one backend needs of time. None stands for the setting of the same name of the cache.

    Raises ConfigError for a value that the setting may not have.
    """

    lookup_timeout_seconds: float | None = None
    load_timeout_seconds: float | None = None
    store_timeout_seconds: float | None = None
    breaker_failures: int | None = None
    breaker_reset_seconds: float | None = None

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value is not None:
                CacheConfig.check(name, value)


Room = Callable[[Sequence[int]], list[memoryview]]
"""Gives memory for objects of these sizes in bytes. Raises OSError where there is none."""


class Backend(ABC):
    """Storage for objects.

    The caller guarantees that keys and buffers are of equal number, that a buffer is exactly as long as the object and
    is touched by nobody else until the call returns, and that `open` comes first and `close` last. Timeouts, retries
    and the circuit breaker are the caller's.

    The backend guarantees that it may be asked from many tasks at once, that it never holds the loop (what blocks
    runs in threads of its own), and that it touches buffers only until the call returns, cancelled or not.
    """

    name: str
    """What it is called in statistics, logs and errors; no two backends of a cache have the same."""
    limits: Limits = Limits()
    """Its own timeouts and breaker, which come before the settings of the cache; parameters of its URL set them."""
    placement: Placement = Placement()
    """Which chunks it is given; parameters of its URL set that, too."""
    shared: bool = False
    """Whether others may add and remove objects behind this process's back, as in a store that hosts share."""

    ttl_seconds: float | None = None
    """How long after its store an object is gone by itself, of which nobody is told; None if it stays."""
    on_removed: Callable[[bytes, Removal], None] = staticmethod(nobody_listens)
    """What to call in the loop's thread when objects of a chunk (all, or any one) have left, and why.

    The cache sets it. It finds out by itself what is deleted through it, and what a load shows to be gone or damaged;
    of what is evicted or has expired only the backend knows. To call it twice for one chunk does no harm, and neither
    does a backend that never calls it, but that a miss is explained less well.
    """

    def register(self, fd: int, memory: memoryview) -> None:  # noqa: B027
        """Take note of the memory that buffers will be from: a memory file, and all of it as it is mapped here.

        Called before `open`, if at all: whoever has it registered with a NIC, or mapped by another process, loads to
        it without a copy. It can be mapped for writing until `open` has returned, and stays mapped until `close` has.
        Buffers may be elsewhere all the same.
        """

    async def open(self) -> None:  # noqa: B027 (a backend without resources needs none)
        """Become ready to answer. Recovery of a large index goes on behind it."""

    @abstractmethod
    async def lookup(self, keys: Sequence[ObjectKey]) -> list[bool]:
        """For each key, whether the object is present; if so it is pinned until `unpin`.

        Pins count: an object found twice is unpinned twice. A call that raises, or is cancelled, has pinned nothing.
        """

    def lookup_nowait(self, chunk_hashes: Sequence[bytes], objects: Sequence[tuple[int, int]]) -> list[bool] | None:
        """For each chunk, whether all these objects, given as (rank, group), are present; if so they are pinned.

        None, and no pin, if that cannot be said without waiting, or if only some objects of a chunk are present.
        """
        return None

    def pin_prefix(self, chunk_hashes: Sequence[bytes]) -> None:  # noqa: B027
        """Keep these chunks, there or not, until `unpin_prefix`: more that builds on them is about to be stored.

        They come in the order of their prefix, what others build on first. A backend that evicts has use for this, and
        for `unpin_prefix`: without the head of its prefix a chunk serves nobody.
        """

    def unpin_prefix(self, chunk_hashes: Sequence[bytes]) -> None:  # noqa: B027
        """Keep these chunks no longer. They were used just now, and the last one is to leave before the first."""

    @abstractmethod
    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        """Give back one pin of each key. Objects that were removed meanwhile, or a closed backend, are no error."""

    @abstractmethod
    async def load(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[LoadOutcome]:
        """Fill each buffer with its object, verified. A store of an object that was CORRUPT or FAILED replaces it.

        A lookup does not find a CORRUPT object any more. Raises BackendError if the storage failed and the call brought
        nothing; a fault of some of its objects is an outcome of these.
        """

    async def load_sized(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[int | LoadOutcome]:
        """Load as `load` does, but into buffers that may be longer: for each object its size, or why it is not there.

        The object is at the start of its buffer, and what lies behind it there may be overwritten. One that is longer
        than its buffer is not the one that was asked for, and so CORRUPT. A backend need not have this: it is what a
        codec asks of the backend that it wraps, since nobody knows how long an encoded object is until it is read.
        """
        raise NotImplementedError(f"{self.name} cannot load what it is not told the size of")

    async def load_listed(
        self, keys: Sequence[ObjectKey], sizes: Sequence[int], room: Room
    ) -> list[memoryview | LoadOutcome]:
        """Load objects of which one knows what `keys` listed: the bytes that it counts for each. That is for copies.

        For each object all of it, in memory that `room` gives, or what `load` says of it.
        """
        buffers = room(sizes)
        outcomes = await self.load(keys, buffers)
        return [
            buffer if outcome is LoadOutcome.LOADED else outcome
            for buffer, outcome in zip(buffers, outcomes, strict=True)
        ]

    @abstractmethod
    async def store(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[bool]:
        """Store each object, whole or not at all; False where it was not stored. Storing what is there is True.

        Where room is needed later, the objects of a call leave from its last one to its first. Raises BackendError if
        the storage failed and nothing of the call was stored.
        """

    @abstractmethod
    async def delete(self, keys: Sequence[ObjectKey]) -> int:
        """Remove objects, pinned or not, and say how many were there. What is stored again later has its own pins."""

    @abstractmethod
    def keys(self) -> AsyncIterator[tuple[ObjectKey, int]]:
        """Iterate over all objects, each with the bytes that it counts in `usage`, for recovery and listing."""

    @abstractmethod
    def usage(self) -> BackendUsage:
        """What the backend holds, as far as it knows without waiting."""

    async def close(self) -> None:  # noqa: B027
        """End threads and close files; idempotent. Waits for calls that touch buffers, but not for a dead disk."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {getattr(self, 'name', 'without a name')!r}>"


def check_lengths(keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> None:
    """Raises ValueError unless there is a buffer for each key, as the caller guarantees."""
    if len(keys) != len(buffers):
        raise ValueError(f"{len(keys)} keys with {len(buffers)} buffers")
