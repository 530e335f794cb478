"""Observers: who is told what happens in a cache, after the step in which it happened."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from msgspec import Struct

from async_cache.handles.prefetch import Prefetch
from async_cache.prompt.layout import Prompt
from async_cache.values import LoadResult, LookupHits, Removal

log = logging.getLogger(__name__)


class ObservedChunk(Struct, frozen=True):
    """A chunk, as it was when the event happened.

    `owner` is the salt that it belongs to, `objects` says which of its objects are published, by bit (see
    `prompt.objects`), `is_whole` whether these are all, and `room_bytes` what it takes of L1. It has so many `tokens`,
    and `parent` lies before it in its prompt. Of what is copied between backends and is not in L1, owner and parent are
    None: they are not known.
    """

    chunk_hash: bytes
    owner: str | None
    objects: int
    room_bytes: int
    is_whole: bool
    tokens: int
    parent: bytes | None


class Observer:
    """Something that is told of events: override those of interest.

    An event is told in the loop's next turn, in the order in which all of them happened. So whatever an observer does
    or raises comes after the decision that it hears of, and cannot change it.
    """

    def promised(self, prefetch: Prefetch, hits: LookupHits) -> None:
        """A lookup is done: so much of a prompt will be served."""

    def loaded(self, prefetch: Prefetch, result: LoadResult) -> None:
        """A load is done: so much of a prompt is in memory."""

    def over(self, prefetch: Prefetch) -> None:
        """A request is over: its id may be used anew, by another one."""

    def committed(self, chunk: ObservedChunk) -> None:
        """Objects of a chunk were published in L1, by a writer or by a load."""

    def evicted(self, chunk: ObservedChunk, removal: Removal) -> None:
        """A chunk had to leave L1, since something else needed its room."""

    def removed(self, chunk: ObservedChunk, removal: Removal) -> None:
        """A chunk was taken out of L1 on demand."""

    def stored(self, backend: str, chunk: ObservedChunk) -> None:
        """A backend has all of a chunk, which it had not before."""

    def left(self, backend: str, chunk_hash: bytes, removal: Removal, owner: bytes) -> None:
        """A chunk cannot be loaded from a backend any more. `owner`: a tag of the salt (see `ledger`)."""


F = TypeVar("F", bound=Callable[..., None])


class Listeners(list[F]):
    """Those who are told of one event."""

    call_soon: Callable[..., object] | None = None
    """That of the cache's loop: to look for the loop anew would cost as much as the rest."""


class Observers:
    """The observers of one cache: any number, each told only of the events that it overrides.

    Every event has a list of those who are told. Whoever makes an event looks at the list first, so that an event that
    interests nobody costs next to nothing.
    """

    def __init__(self) -> None:
        self.counting: tuple[Callable[[Any, LoadResult], None], ...] = ()
        """Those who only count what has loaded: called within the step with the record of a request (`read.request`),
        since to tell them later costs as much as to count. They raise nothing, and call nothing of the cache."""
        self.asking: tuple[Callable[[Prompt], None], ...] = ()
        """Those who note each prompt that is asked for, when its hashes are known: within the step, as above."""
        self.hinting: tuple[Callable[[Prompt, int | None, bool | None, float | None], None], ...] = ()
        """Those who note what engines know of the future of prompts: see `AsyncCache.hint`; within the step."""
        self.ending: tuple[Callable[[Prefetch], None], ...] = ()
        """Those who have to know within the step that a request is over: they raise nothing, and call nothing of the
        cache."""
        self.promised: Listeners[Callable[[Prefetch, LookupHits], None]] = Listeners()
        self.loaded: Listeners[Callable[[Prefetch, LoadResult], None]] = Listeners()
        self.over: Listeners[Callable[[Prefetch], None]] = Listeners()
        self.committed: Listeners[Callable[[ObservedChunk], None]] = Listeners()
        self.evicted: Listeners[Callable[[ObservedChunk, Removal], None]] = Listeners()
        self.removed: Listeners[Callable[[ObservedChunk, Removal], None]] = Listeners()
        self.stored: Listeners[Callable[[str, ObservedChunk], None]] = Listeners()
        self.left: Listeners[Callable[[str, bytes, Removal, bytes], None]] = Listeners()

    def add(self, observer: Observer) -> None:
        """Tell it of all that happens from now on."""
        for event, listeners in self._lists():
            if getattr(type(observer), event) is not getattr(Observer, event):
                listeners.append(getattr(observer, event))

    def discard(self, observer: Observer) -> None:
        """Tell it nothing any more, but what has happened already."""
        for event, listeners in self._lists():
            callback = getattr(observer, event)
            if callback in listeners:
                listeners.remove(callback)

    def _lists(self) -> list[tuple[str, list[Any]]]:
        return [(event, listeners) for event, listeners in vars(self).items() if isinstance(listeners, list)]


def notify(listeners: Listeners[Any], *event: Any) -> None:
    """Call those on a list with an event, in the loop's next turn."""
    call_soon = listeners.call_soon
    if call_soon is None:
        call_soon = listeners.call_soon = asyncio.get_running_loop().call_soon
    for callback in listeners:
        call_soon(_call, callback, event)


def _call(callback: Callable[..., None], event: tuple[Any, ...]) -> None:
    try:
        callback(*event)
    except (Exception, asyncio.CancelledError):
        log.exception("an observer failed: %r", callback)
