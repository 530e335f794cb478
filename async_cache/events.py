"""The events of a cache: what was stored and removed, for those who read them, and no work while there is nobody."""

import weakref
from collections.abc import Callable, Iterable

from async_cache.handles.events import EventStream
from async_cache.ledger.ledger import Ledger
from async_cache.observe import ObservedChunk, Observer, Observers
from async_cache.values import Event, Removal, Removed, Stored

_Reader = tuple["weakref.ref[EventStream]", frozenset[str] | None]
"""A stream, which is not kept alive, and the salts that it hears of; all if None."""


class Events(Observer):
    """Observes a cache for its streams, as long as there are any.

    What concerns a chunk in a backend whose owner is not known any more is told to those who may hear of all.
    """

    def __init__(self, observers: Observers, ledger: Ledger):
        self._observers = observers
        self._ledger = ledger
        self._readers: list[_Reader] = []

    def stream(self, capacity: int, salts: Iterable[str] | None = None) -> EventStream:
        """What happens from now on, of these salts or, if None, of all."""
        if not self._readers:
            self._observers.add(self)
        stream = EventStream(capacity, self._closed)
        self._readers.append((weakref.ref(stream), frozenset(salts) if salts is not None else None))
        return stream

    def _closed(self, closed: EventStream | None = None) -> None:
        """Forget a stream, and those that nobody has any more."""
        readers = [(ref, salts) for ref, salts in self._readers if ref() not in (None, closed)]
        if self._readers and not readers:
            self._observers.discard(self)
        self._readers = readers

    def close(self, error: Exception) -> None:
        """End all streams with an error."""
        for ref, _ in self._readers:
            if (stream := ref()) is not None:
                stream.break_with(error)
        self._readers = []
        self._observers.discard(self)

    # What happens.

    def committed(self, chunk: ObservedChunk) -> None:
        if chunk.is_whole:
            self._tell(Stored(chunk.chunk_hash, chunk.parent, chunk.tokens, "l1", None), chunk.owner)

    def evicted(self, chunk: ObservedChunk, removal: Removal) -> None:
        if chunk.is_whole:
            self._tell(Removed(chunk.chunk_hash, "l1", None, removal), chunk.owner)

    def removed(self, chunk: ObservedChunk, removal: Removal) -> None:
        self.evicted(chunk, removal)

    def stored(self, backend: str, chunk: ObservedChunk) -> None:
        self._tell(Stored(chunk.chunk_hash, chunk.parent, chunk.tokens, "l2", backend), chunk.owner)

    def left(self, backend: str, chunk_hash: bytes, removal: Removal, owner: bytes) -> None:
        event = Removed(chunk_hash, "l2", backend, removal)
        self._put(event, lambda salts: owner in map(self._ledger.tag, salts))

    def _tell(self, event: Event, owner: str | None) -> None:
        self._put(event, lambda salts: owner in salts)

    def _put(self, event: Event, is_of: Callable[[frozenset[str]], bool]) -> None:
        for ref, salts in self._readers:
            stream = ref()
            if stream is None:  # gone without a word
                self._closed()
            elif salts is None or is_of(salts):
                stream.put(event)
