"""`Wrapper`: a backend that hands everything on to another one; what it does itself, a subclass says."""

from collections.abc import AsyncIterator, Callable, Sequence

from async_cache.l2.backend import Backend, Coming, Loaded, LoadOutcome, Reader, Room, Sealer
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.origin import Origin, Selection
from async_cache.retention.quotas import Bounds
from async_cache.values import BackendUsage, Removal


class Wrapper(Backend):
    """The backend `inner`, with its name, limits and placement; it opens and closes with this one.

    It never answers a lookup at once: most that is done before one has to wait.
    """

    def __init__(self, inner: Backend):
        self.inner = inner
        self.name = inner.name
        self.limits, self.placement, self.shared = inner.limits, inner.placement, inner.shared
        self.ttl_seconds = inner.ttl_seconds
        self.unit_bytes, self.least_object_bytes = inner.unit_bytes, inner.least_object_bytes
        self.retains, self.learns = inner.retains, inner.learns

    @property
    def on_removed(self) -> Callable[[bytes, Removal], None]:
        """Whom the inner backend tells."""
        return self.inner.on_removed

    @on_removed.setter
    def on_removed(self, told: Callable[[bytes, Removal], None]) -> None:
        self.inner.on_removed = told

    def register(self, fd: int, memory: memoryview) -> None:
        self.inner.register(fd, memory)

    async def open(self) -> None:
        await self.inner.open()

    async def lookup(self, keys: Sequence[ObjectKey]) -> list[bool]:
        return await self.inner.lookup(keys)

    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        self.inner.unpin(keys)

    def pin_prefix(self, chunk_hashes: Sequence[bytes]) -> None:
        self.inner.pin_prefix(chunk_hashes)

    def unpin_prefix(self, chunk_hashes: Sequence[bytes]) -> None:
        self.inner.unpin_prefix(chunk_hashes)

    def bound(self, bounds: Bounds) -> None:
        self.inner.bound(bounds)

    def asked(self, path: Sequence[bytes], tokens: int, chunk_tokens: int, origin: Origin) -> None:
        self.inner.asked(path, tokens, chunk_tokens, origin)

    def hint(
        self, path: Sequence[bytes], output_tokens: int | None, returns: bool | None, within_seconds: float | None
    ) -> None:
        self.inner.hint(path, output_tokens, returns, within_seconds)

    def coming(self, chunks: Sequence[Coming]) -> None:
        self.inner.coming(chunks)

    def retain(self, chunk_hashes: Sequence[bytes]) -> None:
        self.inner.retain(chunk_hashes)

    def unretain(self, chunk_hashes: Sequence[bytes]) -> None:
        self.inner.unretain(chunk_hashes)

    async def notes(self) -> dict[str, bytes]:
        return await self.inner.notes()

    async def note(self, name: str) -> bytes | None:
        return await self.inner.note(name)

    async def keep_note(self, name: str, note: bytes | None) -> None:
        await self.inner.keep_note(name, note)

    async def load(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[LoadOutcome]:
        return await self.inner.load(keys, buffers)

    async def load_each(
        self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview], loaded: Loaded
    ) -> list[LoadOutcome]:
        return await self.inner.load_each(keys, buffers, loaded)

    async def load_sized(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[int | LoadOutcome]:
        return await self.inner.load_sized(keys, buffers)

    async def load_listed(
        self, keys: Sequence[ObjectKey], sizes: Sequence[int], room: Room
    ) -> list[memoryview | LoadOutcome]:
        return await self.inner.load_listed(keys, sizes, room)

    async def store(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[bool]:
        return await self.inner.store(keys, buffers)

    async def delete(self, keys: Sequence[ObjectKey]) -> int:
        return await self.inner.delete(keys)

    def keys(self) -> AsyncIterator[tuple[ObjectKey, int]]:
        return self.inner.keys()

    def keys_of(self, selection: Selection) -> AsyncIterator[tuple[ObjectKey, int]]:
        return self.inner.keys_of(selection)

    def chunks_without_origin(self) -> int | None:
        return self.inner.chunks_without_origin()

    def seal_names(self, seal: Sealer, read: Reader) -> None:
        self.inner.seal_names(seal, read)

    def usage(self) -> BackendUsage:
        return self.inner.usage()

    async def close(self) -> None:
        await self.inner.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.inner!r}>"
