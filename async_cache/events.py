"""The events of a cache: what was stored and removed, for those who read them, and no work while there is nobody."""

import weakref
from collections.abc import Iterable

from async_cache.handles.events import EventStream
from async_cache.ledger.ledger import Ledger
from async_cache.observe import ObservedChunk, Observer, Observers
from async_cache.values import Event, Removal, Removed, Stored


class Events(Observer):
    """Observes a cache for its streams, which it does not keep alive. Each hears of the salts that it may.

    What left a backend whose owner is forgotten is told to those who may hear of all.
    """

    def __init__(self, observers: Observers, ledger: Ledger):
        self._observers = observers
        self._ledger = ledger
        self._streams: weakref.WeakKeyDictionary[EventStream, frozenset[str] | None] = weakref.WeakKeyDictionary()

    def stream(self, capacity: int, salts: Iterable[str] | None = None) -> EventStream:
        """What happens from now on, of these salts or, if None, of all."""
        if not self._streams:
            self._observers.discard(self)
            self._observers.add(self)
        stream = EventStream(capacity, self._closed)
        self._streams[stream] = frozenset(salts) if salts is not None else None
        return stream

    def _closed(self, stream: EventStream) -> None:
        self._streams.pop(stream, None)
        if not self._streams:
            self._observers.discard(self)

    def close(self, error: Exception) -> None:
        """End all streams with an error."""
        for stream in list(self._streams):
            stream.break_with(error)
        self._streams.clear()
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
        for stream, salts in self._readers():
            if salts is None or owner in map(self._ledger.tag, salts):
                stream.put(event)

    def _tell(self, event: Event, owner: str) -> None:
        for stream, salts in self._readers():
            if salts is None or owner in salts:
                stream.put(event)

    def _readers(self) -> list[tuple[EventStream, frozenset[str] | None]]:
        readers = list(self._streams.items())
        if not readers:  # the last one is gone without a word
            self._observers.discard(self)
        return readers
