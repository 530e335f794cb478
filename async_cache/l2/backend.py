"""What a storage backend promises. `async_cache.testing` has the suite that holds one to it."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from enum import Enum
from functools import partial

from msgspec import Struct

from async_cache.config import CacheConfig
from async_cache.l2.placement import Placement
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.origin import Origin, Selection
from async_cache.retention.quotas import Bounds
from async_cache.values import BackendUsage, Removal


def nobody_listens(chunk_hash: bytes, removal: Removal) -> None:
    """What a backend that no cache uses has to tell."""


def telling(backend: "Backend") -> Callable[[bytes, Removal], None]:
    """Call this backend's `on_removed`, as what it owns may: it is not kept alive for that, with all that it holds."""
    return partial(_tell, weakref.ref(backend))


def _tell(told: "weakref.ref[Backend]", chunk_hash: bytes, removal: Removal) -> None:
    if (backend := told()) is not None:
        backend.on_removed(chunk_hash, removal)


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


Loaded = Callable[[int], object]
"""Told the number of an object, in its call, that is loaded and verified: the call does not touch its buffer any more.

It may be called in any thread.
"""

LookupNowait = Callable[[Sequence[bytes], Sequence[tuple[int, int]]], list[bool] | None]
"""Answers as `Backend.lookup_nowait` does."""

Room = Callable[[Sequence[int]], list[memoryview]]
"""Gives memory for objects of these sizes in bytes. Raises OSError where there is none."""


Sealer = Callable[[str, bytes], bytes]
"""Encodes what is kept under a name."""
Reader = Callable[[str, bytes], bytes | None]
"""Decodes what is kept under a name; None for what cannot be read."""


class Coming(Struct, frozen=True, gc=False):
    """A chunk that is about to be stored: what lies before it in its prompt, where that is known, and what it is of."""

    chunk_hash: bytes
    parent: bytes | None
    origin: Origin


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

    retains: bool = False
    """Whether it keeps what `retain` names for as long as it takes, and not only what it has room for."""

    follows: bool = False
    """Whether it has more to say of a lookup at once when it has heard of what others stored: see `lookup_later`."""

    learns: bool = False
    """Whether what leaves first depends on what is asked for: then it wants to hear of each prompt, by `asked`."""
    unit_bytes: int = 1
    """Of what it has room for, each object takes a multiple of this."""
    least_object_bytes: int = 1
    """And so much at least: what is known of it takes memory, too."""

    def __init_subclass__(cls) -> None:
        """Have a class that loads in its own way, and says nothing meanwhile, asked for its `load`, and no other's."""
        super().__init_subclass__()
        if "load" in vars(cls) and "load_each" not in vars(cls):
            cls.load_each = Backend.load_each  # type: ignore[method-assign]

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

    async def lookup_later(self) -> LookupNowait | None:
        """Find out what others have stored; what answers as `lookup_nowait` does from then on, by what is known then.

        None if nothing does. It is for those backends that say `follows`: they are asked so once for each lookup that
        `lookup_nowait` has not answered, and by `lookup` where that does not do.
        """
        return None

    def present_nowait(self, chunk_hashes: Sequence[bytes], objects: Sequence[tuple[int, int]]) -> list[bool] | None:
        """As `lookup_nowait`, for who only wants to know: nothing is pinned or touched."""
        return None

    def pin_prefix(self, chunk_hashes: Sequence[bytes]) -> None:  # noqa: B027
        """Keep these chunks, there or not, until `unpin_prefix`: more that builds on them is about to be stored.

        They come in the order of their prefix, what others build on first. A backend that evicts has use for this, and
        for `unpin_prefix`: without the head of its prefix a chunk serves nobody.
        """

    def unpin_prefix(self, chunk_hashes: Sequence[bytes]) -> None:  # noqa: B027
        """Keep these chunks no longer. They were used just now, and the last one is to leave before the first."""

    def bound(self, bounds: Bounds) -> None:  # noqa: B027
        """Keep owners within their quotas from now on. A backend that does not evict need not know of them.

        It is called again, with the same bounds, where the quotas have changed.
        """

    def asked(  # noqa: B027
        self, path: Sequence[bytes], tokens: int, chunk_tokens: int, origin: Origin
    ) -> None:
        """A request asked for the chunks on this path, which begin a prompt of so many tokens, there or not."""

    def hint(  # noqa: B027
        self, path: Sequence[bytes], output_tokens: int | None, returns: bool | None, within_seconds: float | None
    ) -> None:
        """What an engine knows of the future of a path: see `EvictionPolicy.hint`."""

    def coming(self, chunks: Sequence[Coming]) -> None:  # noqa: B027
        """Objects of these chunks are about to be stored. Who forgets that knows less of what leaves first."""

    def retain(self, chunk_hashes: Sequence[bytes]) -> None:
        """Keep these chunks, there or not, until `unretain`: a pin that somebody may hold for hours.

        Each call is undone by one of `unretain`. It is for those backends that say `retains`.
        """
        raise NotImplementedError(f"{self.name} cannot retain anything")

    def unretain(self, chunk_hashes: Sequence[bytes]) -> None:
        """Keep these chunks no longer, which were not used for that. They come in the order of their prefix."""
        raise NotImplementedError(f"{self.name} cannot retain anything")

    async def notes(self) -> dict[str, bytes]:
        """The notes that were kept beside the objects, by their names: empty where they have not outlived a restart."""
        return {}

    async def note(self, name: str) -> bytes | None:
        """The note that was kept under a name; None if there is none. Who keeps many reads but this one."""
        return (await self.notes()).get(name)

    async def keep_note(self, name: str, note: bytes | None) -> None:  # noqa: B027
        """Keep a note of some kilobytes under a name of letters and digits, as long as objects are kept; None: remove.

        Raises BackendError if that could not be done. A backend that forgets its objects need not remember notes.
        """

    @abstractmethod
    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        """Give back one pin of each key. Objects that were removed meanwhile, or a closed backend, are no error."""

    @abstractmethod
    async def load(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[LoadOutcome]:
        """Fill each buffer with its object, verified. A store of an object that was CORRUPT or FAILED replaces it.

        A lookup does not find a CORRUPT object any more. Raises BackendError if the storage failed and the call brought
        nothing; a fault of some of its objects is an outcome of these.
        """

    async def load_each(
        self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview], loaded: Loaded
    ) -> list[LoadOutcome]:
        """Load objects as `load` does, and say of each that it is `loaded` when it is, while others are on their way.

        What was said to be loaded is, whatever becomes of the call. A backend that cannot say it need not have this.
        """
        return await self.load(keys, buffers)

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

    def keys_of(self, selection: Selection) -> AsyncIterator[tuple[ObjectKey, int]]:
        """Iterate over the objects of chunks that are known to be of what is selected, each with its size as in `keys`.

        It is for those that say `chunks_without_origin`.
        """
        raise NotImplementedError(f"{self.name} does not know what its objects are of")

    def chunks_without_origin(self) -> int | None:
        """How many chunks it has of which it does not know what they are of; None: it knows that of none."""
        return None

    def seal_names(self, seal: Sealer, read: Reader) -> None:  # noqa: B027
        """Keep the names of salts and models, where it keeps them, as these two functions write and read them.

        They block: they are for threads. Who wraps a backend that encrypts calls it before `open`.
        """

    @abstractmethod
    def usage(self) -> BackendUsage:
        """What the backend holds, as far as it knows without waiting."""

    async def close(self) -> None:  # noqa: B027
        """End threads and close files; idempotent. Waits for calls that touch buffers, but not for a dead disk."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {getattr(self, 'name', 'without a name')!r}>"


def not_told(number: int) -> None:
    """What a load has to tell where nobody waits for single objects."""


def check_lengths(keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> None:
    """Raises ValueError unless there is a buffer for each key, as the caller guarantees."""
    if len(keys) != len(buffers):
        raise ValueError(f"{len(keys)} keys with {len(buffers)} buffers")
