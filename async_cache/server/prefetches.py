"""The prefetches of connections: what their clients are told, and which of them hold a request together."""

import asyncio

from async_cache.cache import AsyncCache
from async_cache.errors import LimitError
from async_cache.handles.prefetch import Prefetch, Promised
from async_cache.observe import Observers
from async_cache.protocol import messages
from async_cache.protocol.connection import Connection
from async_cache.protocol.parts import split_hits, split_result
from async_cache.server.access import Scope
from async_cache.server.accounts import Account
from async_cache.server.held import Held, Table
from async_cache.values import LoadResult, LookupHits


class HeldPrefetch(Held):
    """A prefetch of a connection, held until its request is over.

    Its client is told the hits and the result in the loop's next turn, and the end of the request after them. Where
    the cache closes, neither comes, but the end of the connection.
    """

    __slots__ = ("_holders", "_holding", "_scope", "prefetch")

    def __init__(
        self,
        number: int,
        held: Table,
        connection: Connection,
        prefetch: Prefetch,
        holders: "Holders",
        scope: Scope,
        holding: "Holding",
    ):
        super().__init__(number, held, connection)
        self.prefetch = prefetch
        self._holders = holders
        self._scope = scope
        self._holding = holders.add(self, holding)
        prefetch.promised.hits.tell(self._promised)
        prefetch.promised.result.tell(self._loaded)

    def _promised(self, hits: LookupHits) -> None:
        if self._holders.may_lease(self._holding, self, hits):
            self._connection.send(messages.LookupDone(self._number, *split_hits(self._scope.outer(hits))))

    def _loaded(self, result: LoadResult) -> None:
        self._holding.loaded()
        if self._holding.refused is None:
            self._connection.send(messages.LoadDone(self._number, *split_result(self._scope.outer(result))))

    def claimed(self, claimed: bool) -> None:
        """Tell the client that the result was handed out, or its claim undone, by any connection."""
        self._connection.send(messages.RequestClaimed(self._number, claimed))

    def over(self) -> None:
        """Take note that the request is over, for any reason; its client is told a turn later, and it goes."""
        self._held.over += 1

    def tell_over(self) -> None:
        """Tell the client that the request is over, unless the connection is gone by now."""
        self._held.over -= 1
        if not self.is_held:
            return
        self._gone()
        error = self._holding.refused or self.prefetch.promised.result.error
        over = messages.RequestOver(self._number) if error is None else messages.failed(self._number, error)
        self._connection.send(over)

    def undo(self) -> None:
        """Cancel the prefetch. It stays held, since its request is not over, and what has loaded stays."""
        self.prefetch.cancel()

    def release(self) -> None:
        """Leave the request, which ends with the last that holds it."""
        self._gone()
        self._holders.discard(self)


class Holding:
    """Who holds a request, and what that takes of their tenant's limits; a chunk of it takes `chunk_bytes` of L1."""

    __slots__ = ("account", "chunk_bytes", "held", "is_promised", "loading_bytes", "record_bytes", "refused")

    def __init__(self, account: Account, record_bytes: int, chunk_bytes: int):
        self.account = account
        self.record_bytes = record_bytes
        self.chunk_bytes = chunk_bytes
        self.is_promised = False
        self.loading_bytes = 0
        self.held: dict[HeldPrefetch, None] = {}
        self.refused: LimitError | None = None

    def promise(self, hits: LookupHits) -> None:
        """Take what was promised, once. Raises LimitError: it cannot be held."""
        if not self.is_promised:
            self.is_promised = True
            loading_bytes = hits.l2_chunks * self.chunk_bytes
            self.account.lease(loading_bytes)
            self.loading_bytes = loading_bytes

    def loaded(self) -> None:
        """What was promised has loaded: L1 knows from here on whose it is."""
        self.account.give("leased_share", self.loading_bytes)
        self.loading_bytes = 0


_holders_of: "dict[Observers, Holders]" = {}
"""By the observers of a cache, the holders of its requests, while a server of it is open."""


class Holders:
    """The prefetches of all connections to one cache, by their requests; several servers of a cache share them.

    An id may be used anew in the step in which its request ends, of which its client is told in the loop's next turn.
    So a request stands here for itself, and not its id.
    """

    def __init__(self, cache: AsyncCache):
        self._requests, self._observers = cache.core.requests, cache.core.observers
        self._holdings: dict[Promised, Holding] = {}
        self._servers = 0
        self._call_soon = asyncio.get_running_loop().call_soon

    @classmethod
    def of(cls, cache: AsyncCache) -> "Holders":
        """Those of a cache, for one more server, which has to `close` them."""
        holders = _holders_of.get(cache.core.observers)
        if holders is None:
            holders = _holders_of[cache.core.observers] = cls(cache)
            cache.core.observers.ending += (holders.over,)
        holders._servers += 1
        return holders

    def close(self) -> None:
        """Observe nothing any more, once all servers of the cache have closed them."""
        self._servers -= 1
        if not self._servers:
            del _holders_of[self._observers]
            self._observers.ending = tuple(end for end in self._observers.ending if end != self.over)

    def know(self, held: HeldPrefetch) -> bool:
        """Whether the request of a prefetch is not over."""
        request = held.prefetch.promised
        return self._requests.find(request.request_id) is request

    def add(self, held: HeldPrefetch, holding: Holding) -> Holding:
        """Have a request last as long as this prefetch is held; it is the holding of the first."""
        holding = self._holdings.setdefault(held.prefetch.promised, holding)
        holding.held[held] = None
        return holding

    def find(self, request_id: str) -> Holding | None:
        """That of a request that is not over."""
        request = self._requests.find(request_id)
        return self._holdings.get(request) if request is not None else None

    def may_lease(self, holding: Holding, held: HeldPrefetch, hits: LookupHits) -> bool:
        """Whether a request may have what it was promised; else it ends, and those who hold it hear why."""
        try:
            holding.promise(hits)
        except LimitError as error:
            holding.refused = error
            if self.know(held):
                self._requests.end(held.prefetch.promised.request_id)
        return holding.refused is None

    def discard(self, held: HeldPrefetch) -> None:
        """End a request if no other prefetch holds it."""
        request = held.prefetch.promised
        holding = self._holdings.get(request)
        if holding is None:  # it is over
            return
        del holding.held[held]
        if not holding.held:
            self._forget(request)
            if self.know(held):
                self._requests.end(request.request_id)

    def _forget(self, request: Promised) -> Holding | None:
        holding = self._holdings.pop(request, None)
        if holding is not None:
            holding.account.give_request(holding.record_bytes)
            holding.loaded()
        return holding

    def claimed(self, request_id: str, claimed: bool) -> None:
        """Tell those who hold a request that its result was handed out, or given back.

        Where its claim has ended the request, they hear of its end instead.
        """
        holding = self.find(request_id)
        for held in holding.held if holding is not None else ():
            held.claimed(claimed)

    def over(self, prefetch: Prefetch) -> None:
        """Take note that the request of a prefetch is over, and have those who hold it told."""
        holding = self._forget(prefetch.promised)
        if holding is not None:
            held, holding.held = holding.held, {}
            for one in held:
                one.over()
                self._call_soon(one.tell_over)
