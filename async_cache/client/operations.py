"""What is asked of a server that is not about a prompt: what it holds of whom, its backends, and its settings."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

from async_cache.client.links import Links
from async_cache.handles.events import EVENTS_CAPACITY, EventStream
from async_cache.prompt.arguments import check_capacity, check_seconds, check_text, check_tier, selection_of
from async_cache.prompt.layout import ModelLayout, check_index
from async_cache.protocol import messages
from async_cache.protocol.messages import MAX_URL
from async_cache.protocol.prompts import layout_of
from async_cache.values import (
    BackendStatus,
    CacheStats,
    Deleted,
    DeletedModel,
    FlushResult,
    ListedChunk,
    Retained,
)

A = TypeVar("A")


class Operations:
    """The part of `CacheClient` that is about the whole cache, and not about prompts."""

    def __init__(self, links: Links):
        self._links = links

    async def _ask(self, answer: type[A], make: Callable[[int], Any], newer: type[messages.Message] | None = None) -> A:
        """Ask the server; what is `newer`, not every server of this version knows."""
        link = self._links.here() or await self._links.ready()
        if newer is not None:
            link.check_knows(newer)
        return await link.ask(answer, make(link.next_number()))

    async def flush(self, deadline_seconds: float | None = None) -> FlushResult:
        """Wait until what was committed is in L2. Counts what was written or dropped since the last flush."""
        seconds = check_seconds("deadline_seconds", deadline_seconds)
        return (await self._ask(messages.Flushed, lambda number: messages.Flush(number, seconds))).result

    async def retained(self) -> list[Retained]:
        """What is retained of the salts of this client's token, the first to expire first. Raises ServiceError."""
        return (await self._ask(messages.RetainedListed, messages.ListRetained, messages.ListRetained)).retained

    async def delete_model(
        self, model: str, *, revision: str | None = None, adapter: str | None = None, salt: str | None = None
    ) -> DeletedModel:
        """Remove what is cached of a model, or of one revision, adapter or salt of it, of the salts of this token.

        `unsure` is "l2" to a token that is bound to salts. Raises BackendError where a backend could not, ServiceError
        for a server that is too old for it.
        """
        selection_of(model, revision, adapter, salt)
        delete = partial(messages.DeleteModel, model=model, revision=revision, adapter=adapter, salt=salt)
        return (await self._ask(messages.ModelDeleted, delete, messages.DeleteModel)).deleted

    async def clear(self, tier: Literal["l1", "all"] = "l1") -> Deleted:
        """Empty L1 of what L2 has ("l1"), or both tiers ("all").

        Raises AccessDeniedError for a token that is bound to salts.
        """
        check_tier(tier)
        return (await self._ask(messages.Removed, lambda number: messages.Clear(number, tier))).deleted

    def events(self, capacity: int = EVENTS_CAPACITY) -> EventStream:
        """What is stored and removed from now on, of the salts of this client's token, in order.

        See `AsyncCache.events`. It is bound to the connection: once that is lost, iterating raises ConnectionLostError,
        and whoever goes on begins anew.
        """
        check_capacity(capacity)
        link = self._links.here()
        if link is None:
            stream = EventStream(capacity)
            stream.break_with(self._links.error)
            return stream
        return link.events(capacity)

    async def stats(self) -> CacheStats:
        """A snapshot of what the server's cache holds, and counters since it was opened."""
        return (await self._ask(messages.Counted, messages.Stats)).stats

    async def ping(self) -> float:
        """The seconds that the server takes to answer."""
        began = time.perf_counter()
        await self._ask(messages.Done, messages.Ping)
        return time.perf_counter() - began

    # Backends and settings.

    async def add_backend(self, url: str, *, position: int | None = None) -> None:
        """Have the server open one more backend, and use it: as the slowest, or before the one at a position.

        Raises ConfigError for a URL or a name that cannot be, ValueError for a position that there is not, BackendError
        for a backend that fails or does not open in time, AccessDeniedError for a token that is bound to salts.
        """
        if not isinstance(url, str):
            raise TypeError(f"a backend must be a URL, not {type(url).__name__}")
        check_text("url", url, MAX_URL)
        if position is not None:
            check_index("position", position, 2**32)
        await self._ask(messages.Done, lambda number: messages.AddBackend(number, url, position))

    async def drain_backend(self, name: str, *, deadline_seconds: float | None = None) -> BackendStatus:
        """Write nothing new to a backend, and copy what only it has to the others that are written to.

        Returns when that is done, or `deadline_seconds` are over: it goes on then, also without this client, and may be
        waited for again. Its state is DRAINED when it is done. Raises ConfigError for a name that there is not,
        BackendError where the copying cannot go on, AccessDeniedError for a token that is bound to salts.
        """
        check_text("name", name, MAX_URL)
        seconds = check_seconds("deadline_seconds", deadline_seconds)
        drain = partial(messages.DrainBackend, name=name, deadline_seconds=seconds)
        return (await self._ask(messages.BackendTold, drain)).backend

    async def remove_backend(self, name: str) -> None:
        """Ask a backend no more, wait for the loads that it was promised for, and close it.

        What only it has is not found any more, unless it was drained before. Raises ConfigError for a name that there
        is not, AccessDeniedError for a token that is bound to salts.
        """
        check_text("name", name, MAX_URL)
        await self._ask(messages.Done, lambda number: messages.RemoveBackend(number, name))

    async def backends(self) -> list[BackendStatus]:
        """The backends that there are now, the fastest first, and behind them those that are being removed.

        Raises AccessDeniedError for a token that is bound to salts.
        """
        return (await self._ask(messages.BackendsListed, messages.ListBackends)).backends

    async def reload(self) -> tuple[list[str], list[str]]:
        """Have the server read its settings anew: the names of those that changed, and those that wait for a restart.

        Raises ConfigError for settings that cannot be used, which changes nothing, BackendError for a backend that does
        not open, and AccessDeniedError for a token that is bound to salts.
        """
        reloaded = await self._ask(messages.Reloaded, messages.Reload)
        return reloaded.changed, reloaded.waiting

    async def roots(self) -> list[tuple[ModelLayout, str, str, int]]:
        """Of which prompts there are chunks: the layout, adapter and salt, and how many are in the server's memory.

        Those that were stored or loaded of late, the newest first, of the salts of this client's token.
        """
        listed = await self._ask(messages.RootsListed, messages.ListRoots)
        return [(layout_of(root.layout), root.adapter, root.salt, root.chunks) for root in listed.roots]

    async def chunks(
        self,
        *,
        model: str | None = None,
        salt: str | None = None,
        backend: str | None = None,
        after: bytes | None = None,
        limit: int = 1000,
    ) -> list[ListedChunk]:
        """Chunks in the server's memory, up to 1000 by their hashes, those after `after`; of a model and salt, or any.

        Or those in a `backend`, for a token that may use every salt: a backend knows hashes only, no models and salts.
        Fewer than `limit` are the last. Only those of the salts of this client's token are told.
        """
        check_index("limit", limit - 1, 1000)
        ask = partial(messages.ListChunks, model=model, salt=salt, after=after, limit=limit, backend=backend)
        return (await self._ask(messages.ChunksListed, ask)).chunks
