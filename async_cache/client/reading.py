"""Reads through a server: what was loaded, or is loading, in its memory, or in bytes that it sends."""

from functools import partial

from async_cache.client.calls import LEFT, PrefetchCall, StreamCall, objects_of
from async_cache.client.link import Link
from async_cache.client.links import Links
from async_cache.client.writing import Post
from async_cache.handles.lease import Entered, Memory
from async_cache.handles.stream import Streamed
from async_cache.prompt.layout import check_index
from async_cache.protocol import messages
from async_cache.protocol.parts import join_result


class Reads:
    """Enters reads for a client. They may be left from any thread: `post` takes that to the client's."""

    def __init__(self, links: Links, post: Post):
        self._links = links
        self._post = post

    async def enter(self, request_id: str, rank: int, reader: int) -> Entered:
        """Wait for the load of a request, and begin to read what it has loaded."""
        link, request, number = await self._begin(request_id, rank, reader)
        acquired, view = await link.acquire(messages.AcquireRead(number, request_id, rank, reader))
        layout = link.layouts.find(acquired.layout)
        objects = objects_of(layout, rank, acquired)
        release = partial(self._post, _release, link, number, request)
        undo = partial(self._post, link.undo, number)
        result, offsets, memory = join_result(acquired.result, acquired.parts), acquired.offsets, Memory(view)
        return Entered(result, layout, rank, offsets, objects, memory, release, undo, lambda: link.connection.is_open)

    async def enter_stream(self, request_id: str, rank: int, reader: int) -> Streamed:
        """Wait for the lookup of a request, and begin to read what it is loading. Raises ServiceError."""
        link, request, number = await self._begin(request_id, rank, reader)
        link.check_knows(messages.AcquireStream)
        call = StreamCall(rank)
        acquired, view = await link.acquire_stream(messages.AcquireStream(number, request_id, rank, reader), call)
        return Streamed(
            link.layouts.find(acquired.layout),
            rank,
            acquired.start_chunk,
            acquired.chunks,
            Memory(view),
            call.more,
            partial(self._post, _release_stream, link, number, request, call),
            partial(self._post, _undo_stream, link, number, call),
            lambda: link.connection.is_open,
        )

    async def _begin(self, request_id: str, rank: int, reader: int) -> tuple[Link, PrefetchCall | None, int]:
        """The link to read by, what this client knows of the request, and a number. Raises TypeError or ValueError."""
        for name, value in (("rank", rank), ("reader", reader)):
            check_index(name, value, 2**32)
        link = self._links.here() or await self._links.ready()
        return link, link.requests.get(request_id), link.next_number()


def _release(link: Link, number: int, request: PrefetchCall | None) -> None:
    link.send(messages.ReleaseRead(link.next_number(), number))
    if request is not None:
        request.state = LEFT


def _release_stream(link: Link, number: int, request: PrefetchCall | None, call: StreamCall) -> None:
    link.calls.pop(number, None)  # whatever comes of it now
    call.end(RuntimeError("the lease was released"))
    _release(link, number, request)


def _undo_stream(link: Link, number: int, call: StreamCall) -> None:
    call.end(RuntimeError("the lease was released"))
    link.undo(number)
