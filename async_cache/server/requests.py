"""The requests of one connection: begun on its tenant's account, asked for, claimed, renewed and ended."""

import asyncio
import weakref
from collections.abc import Callable
from contextvars import Context
from functools import partial

from async_cache.core import Core
from async_cache.handles.prefetch import Promised
from async_cache.prompt.arguments import wanted
from async_cache.prompt.layout import Prompt
from async_cache.prompt.parts import Parts
from async_cache.protocol import messages
from async_cache.protocol.connection import Connection
from async_cache.protocol.messages import Message
from async_cache.protocol.parts import split_hits, split_result
from async_cache.server import costs
from async_cache.server.access import Scope
from async_cache.server.accounts import Account, record_bytes
from async_cache.server.held import Table
from async_cache.server.prefetches import HeldPrefetch, Holders, Holding


class Requests:
    """Answers what a connection asks of requests, of its own and of others of its tenant and namespace.

    What may have ended a request is answered in the loop's next turn: those who hold it hear of that first.
    """

    def __init__(
        self,
        held: Table,
        connection: Connection,
        core: Core,
        scope: Scope,
        holders: Holders,
        account: Account,
        context: Context,
    ):
        self._held = held
        self._connection = connection
        self._core, self._requests = core, core.requests
        self._scope = scope
        self._holders = holders
        self._account = account
        self._context = context
        self._claims: weakref.WeakValueDictionary[str, Promised] = weakref.WeakValueDictionary()
        self._loop = asyncio.get_running_loop()

    def begin(self, message: messages.Prefetch | messages.PrefetchSegments, asked: Prompt | Parts) -> None:
        """Begin a request, or hold the one that runs under this id."""
        request_id, objects = self._scope.inner(message.request_id), asked.layout.objects
        size_bytes = record_bytes(len(asked), costs.objects_of(asked.layout))
        is_new = self._holders.find(request_id) is None
        if is_new:
            self._account.take_request(size_bytes)
        try:
            what = wanted(
                asked,
                request_id=request_id,
                skip_tokens=message.skip_tokens if isinstance(message, messages.Prefetch) else 0,
                ranks=message.ranks,
                deadline_seconds=message.deadline_seconds,
                traceparent=message.traceparent,
                wait_for_writers_seconds=(
                    message.wait_for_writers_seconds if isinstance(message, messages.AwaitingPrefetch) else None
                ),
            )
            prefetch = self._context.run(self._core.start, what)
        except BaseException:
            if is_new:
                self._account.give_request(size_bytes)
            raise
        mask = objects.full_mask if message.ranks is None else objects.mask_of_ranks(message.ranks)
        holding = Holding(self._account, size_bytes, objects.rooms[mask])
        HeldPrefetch(message.number, self._held, self._connection, prefetch, self._holders, self._scope, holding)

    async def query_hits(self, message: messages.QueryPrefetchLookupHits) -> Message:
        """Wait for the lookup of a request."""
        hits = await self._requests.query_lookup_hits(self._scope.inner(message.request_id))
        return messages.Hits(message.number, *split_hits(self._scope.outer(hits)))

    async def query_status(self, message: messages.QueryPrefetchStatus) -> None:
        """Wait for the load of a request, and hand its result out."""
        request_id = self._scope.inner(message.request_id)
        result = await self._requests.query_status(request_id)
        if (request := self._requests.find(request_id)) is not None:
            self._claims[request_id] = request
        self._holders.claimed(request_id, True)
        loaded = messages.Loaded(message.number, *split_result(self._scope.outer(result)))
        if result.chunks:
            self._connection.send(loaded)  # however much is unread: what was claimed is not handed out again
        else:
            self.answer_soon(loaded)

    def unclaim(self, message: messages.Unclaim) -> None:
        """Take back a result that was handed out over this connection."""
        request_id = self._scope.inner(message.request_id)
        request = self._claims.pop(request_id, None)
        if request is not None and self._requests.find(request_id) is request:
            self._requests.unclaim(request_id)
            self._holders.claimed(request_id, False)
        self._connection.send(messages.Done(message.number))

    def renew(self, message: messages.Renew) -> None:
        """Let the time of a request begin anew."""
        self._requests.renew(self._scope.inner(message.request_id))
        self._connection.send(messages.Done(message.number))

    def end(self, message: messages.EndRequest) -> None:
        """End a request; that is answered when all that it held is given back."""
        rooms = self._core.l1.rooms
        before = rooms.given()
        self._requests.end(self._scope.inner(message.request_id))
        given = rooms.given()
        if given == before:
            self.answer_soon(messages.Done(message.number))
        else:
            self._loop.call_soon(self.answer_caught_up, given, partial(messages.Done, message.number))

    def answer_soon(self, answer: Message) -> None:
        """Answer in the loop's next turn."""
        self._loop.call_soon(self._connection.send, answer)

    def answer_caught_up(self, given: list[int], answer: Callable[[], Message]) -> None:
        """Send what is true when all that was released by then is given back: of very much, that takes some turns."""
        if self._core.l1.rooms.has_done(given):
            self._connection.send(answer())
        else:
            self._loop.call_soon(self.answer_caught_up, given, answer)
