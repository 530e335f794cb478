"""What operators ask of a server over a connection: its backends, its settings, and what it holds of whom."""

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from async_cache.cache import AsyncCache
from async_cache.protocol import messages
from async_cache.protocol.messages import Message
from async_cache.protocol.prompts import describe
from async_cache.server.access import Tenant
from async_cache.server.accounts import Account


class Administration:
    """Answers the messages of one connection that are about the whole cache, each as far as its tenant may."""

    def __init__(
        self,
        cache: AsyncCache,
        tenant: Tenant,
        account: Account,
        reload: Callable[[], Awaitable[tuple[list[str], list[str]]]],
    ):
        self._cache, self._core = cache, cache.core
        self._tenant = tenant
        self._listing = account.listing
        self._reload_settings = reload

    async def answer(self, message: Any) -> Message:
        """Do what is asked, and answer. Raises AccessDeniedError, and what else it fails with."""
        return await _ANSWERS[type(message)](self, message)

    async def _clear(self, message: messages.Clear) -> Message:
        self._tenant.check_trusted("clearing the cache")
        return messages.Removed(message.number, await self._cache.clear(message.tier))

    async def _add_backend(self, message: messages.AddBackend) -> Message:
        self._tenant.check_trusted("changing backends")
        await self._cache.add_backend(message.url, position=message.position)
        return messages.Done(message.number)

    async def _drain_backend(self, message: messages.DrainBackend) -> Message:
        self._tenant.check_trusted("changing backends")
        status = await self._cache.drain_backend(message.name, deadline_seconds=message.deadline_seconds)
        return messages.BackendTold(message.number, status)

    async def _remove_backend(self, message: messages.RemoveBackend) -> Message:
        self._tenant.check_trusted("changing backends")
        await self._cache.remove_backend(message.name)
        return messages.Done(message.number)

    async def _list_backends(self, message: messages.ListBackends) -> Message:
        self._tenant.check_trusted("listing backends")
        return messages.BackendsListed(message.number, await self._cache.backends())

    async def _reload(self, message: messages.Reload) -> Message:
        self._tenant.check_trusted("changing settings")
        return messages.Reloaded(message.number, *await self._reload_settings())

    async def _list_roots(self, message: messages.ListRoots) -> Message:
        async with self._listing:
            roots = await self._core.listing.roots(self._tenant.may_use)
        told = [messages.Root(describe(root.layout), root.adapter, root.salt, chunks) for root, chunks in roots]
        return messages.RootsListed(message.number, told)

    async def _list_chunks(self, message: messages.ListChunks) -> Message:
        listing, after = self._core.listing, message.after or b""
        if message.backend is None:
            which = message.model, message.salt, after, message.limit
            async with self._listing:
                return messages.ChunksListed(message.number, await listing.chunks(self._tenant.may_use, *which))
        self._tenant.check_trusted("listing backends")
        if (message.model, message.salt) != (None, None):
            raise ValueError("a backend knows chunks by their hashes only: it cannot be asked for a model or salt")
        async with self._listing:
            return messages.ChunksListed(message.number, await listing.stored(message.backend, after, message.limit))


_ANSWERS: dict[type[Message], Callable[[Administration, Any], Coroutine[Any, Any, Message]]] = {
    messages.Clear: Administration._clear,
    messages.AddBackend: Administration._add_backend,
    messages.DrainBackend: Administration._drain_backend,
    messages.RemoveBackend: Administration._remove_backend,
    messages.ListBackends: Administration._list_backends,
    messages.ListRoots: Administration._list_roots,
    messages.Reload: Administration._reload,
    messages.ListChunks: Administration._list_chunks,
}
