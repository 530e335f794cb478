"""`BlockingClient`: for engines whose scheduler is not asynchronous. It drives a client in a thread of its own."""

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import uvloop

from async_cache.client.client import MAX_REQUEST_ID, CacheClient, connect
from async_cache.client.link import Link
from async_cache.client.writing import RemoteWriter
from async_cache.errors import CacheClosedError
from async_cache.handles.lease import ReadLease
from async_cache.handles.prefetch import Prefetch
from async_cache.prompt.arguments import check_prompt, check_request_id, check_seconds, ranks_of, start_of
from async_cache.prompt.layout import Prompt
from async_cache.values import CacheStats, Deleted, FlushResult, LoadResult, LookupHits

T = TypeVar("T")

_DONE = (concurrent.futures._base.FINISHED, concurrent.futures._base.CANCELLED)


class BlockingFuture(concurrent.futures.Future[T]):
    """A future of which `done()` takes no lock: a scheduler asks in every step."""

    def done(self) -> bool:
        """Whether there is a value, or an error."""
        return self._state in _DONE


class BlockingPrefetch:
    """As `Prefetch`; its futures are those of `concurrent.futures`, and resolve without anybody asking for it."""

    __slots__ = ("_cancel", "load_done", "lookup_done", "request_id")

    def __init__(self, request_id: str, cancel: "Callable[[BlockingPrefetch], object]"):
        self.request_id = request_id
        self.lookup_done: BlockingFuture[LookupHits] = BlockingFuture()
        self.load_done: BlockingFuture[LoadResult] = BlockingFuture()
        self._cancel = cancel

    def cancel(self) -> None:
        """Stop looking up and loading; both futures resolve. Does nothing once it has loaded."""
        self._cancel(self)

    def break_with(self, error: Exception) -> None:
        """Nothing will come."""
        self.lookup_done.set_exception(error)
        self.load_done.set_exception(error)


class BlockingClient:
    """NEW -> OPEN -> CLOSED, by `with` or by `open` and `close`. Its methods may be called from any thread.

    The members are those of `CacheClient`. `prefetch` returns before the server has answered; whatever else has an
    answer waits for it, up to `timeout_seconds` where that is given, and raises TimeoutError then.
    """

    def __init__(self, url: str | None = None, namespace: str = "", **options: Any):
        """The arguments are those of `connect`."""
        self._make = partial(connect, url, namespace, **options)
        self._client: CacheClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._prefetches: dict[BlockingPrefetch, Prefetch] = {}
        self._pid = os.getpid()
        self._ends: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()
        self._lock = threading.Lock()
        self._accepts = True  # what is posted will be called

    # Life.

    def open(self) -> Self:
        """Connect. Raises as `CacheClient.open`."""
        if self._thread is not None:
            raise CacheClosedError("a client is opened once")
        opened: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, args=(opened,), name="async_cache client", daemon=True)
        self._thread.start()
        opened.result()
        return self

    def close(self) -> None:
        """As `CacheClient.close`; idempotent."""
        loop, thread = self._loop, self._thread
        if self._pid != os.getpid():
            return
        if loop is not None and thread is not None and thread.is_alive():
            self._post(self._closing.set)
            thread.join()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, opened: "concurrent.futures.Future[None]") -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve(opened))

    async def _serve(self, opened: "concurrent.futures.Future[None]") -> None:
        self._loop = asyncio.get_running_loop()
        try:
            client = self._make(post=self._post)
            await client.open()
        except Exception as error:
            with self._lock:
                self._accepts = False
            opened.set_exception(error)
            return
        self._client = client
        opened.set_result(None)
        try:
            await self._closing.wait()
        finally:
            self._client = None
            await client.close()
            with self._lock:
                self._accepts = False
            await asyncio.sleep(0)  # and what was posted until now is called

    # To the loop and back.

    def _post(self, call: Callable[..., object], *args: Any) -> bool:
        """Whether it is called: if not, the client is closed, and what was held is given back."""
        assert self._loop is not None
        if self._thread is threading.current_thread():
            call(*args)
            return True
        with self._lock:
            if self._accepts:
                self._loop.call_soon_threadsafe(call, *args)
            return self._accepts

    def _open_client(self) -> CacheClient:
        if self._pid != os.getpid():
            raise CacheClosedError("the client was opened before a fork: open another one in the child")
        if self._client is None:
            raise CacheClosedError(
                "the client was closed" if self._thread is not None else "the client is not open: use `with`, or `open`"
            )
        return self._client

    def _wait(
        self,
        call: Coroutine[Any, Any, T],
        timeout_seconds: float | None = None,
        give_back: Callable[[T], object] | None = None,
    ) -> T:
        """The outcome of a call. One that comes as its waiter gives up is given back."""
        outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
        if self._thread is threading.current_thread():
            call.close()
            raise RuntimeError("a call that waits was made from the client's own thread")
        if not self._post(self._begin, call, outcome, give_back):
            call.close()
            raise CacheClosedError("the client was closed")
        try:
            return outcome.result(timeout_seconds)
        except concurrent.futures.CancelledError:
            raise CacheClosedError("the client was closed") from None
        except TimeoutError:
            if not outcome.cancel():  # there is a value after all, or its own error
                return outcome.result()
            raise
        finally:
            outcome.cancel()

    def _begin(
        self,
        call: Coroutine[Any, Any, T],
        outcome: "concurrent.futures.Future[T]",
        give_back: Callable[[T], object] | None,
    ) -> None:
        task = asyncio.get_running_loop().create_task(_deliver(call, outcome, give_back))
        task.add_done_callback(lambda _: (call.close(), outcome.cancel()))
        outcome.add_done_callback(lambda outcome: outcome.cancelled() and self._post(task.cancel))

    # The members of `CacheClient`.

    def prefetch(
        self,
        prompt: Prompt,
        *,
        request_id: str | None = None,
        skip_tokens: int = 0,
        ranks: Sequence[int] | None = None,
        deadline_seconds: float | None = None,
    ) -> BlockingPrefetch:
        """As `CacheClient.prefetch`, at once: a request id that is in use for something else is told by the futures."""
        client = self._open_client()
        check_prompt(prompt)
        start_of(prompt, skip_tokens), ranks_of(prompt, ranks)
        check_seconds("deadline_seconds", deadline_seconds)
        request_id = client.new_request_id() if request_id is None else check_request_id(request_id, MAX_REQUEST_ID)
        prefetch = BlockingPrefetch(request_id, partial(self._post, self._cancel))
        start = partial(
            client.prefetch,
            prompt,
            request_id=request_id,
            skip_tokens=skip_tokens,
            ranks=ranks,
            deadline_seconds=deadline_seconds,
        )
        if not self._post(self._start, start, prefetch):
            prefetch.break_with(CacheClosedError("the client was closed"))
        return prefetch

    def _start(self, start: Callable[[], Prefetch], prefetch: BlockingPrefetch) -> None:
        try:
            started = start()
        except Exception as error:
            prefetch.break_with(error)
            return
        self._prefetches[prefetch] = started
        started.lookup_done.add_done_callback(partial(_pass_on, prefetch.lookup_done))
        started.load_done.add_done_callback(partial(_pass_on, prefetch.load_done))
        started.load_done.add_done_callback(lambda _: self._prefetches.pop(prefetch))

    def _cancel(self, prefetch: BlockingPrefetch) -> None:
        started = self._prefetches.get(prefetch)
        if started is not None:
            started.cancel()

    def lookup(self, prompt: Prompt, *, timeout_seconds: float | None = None) -> LookupHits:
        """As `CacheClient.lookup`."""
        return self._wait(self._open_client().lookup(prompt), timeout_seconds)

    def query_lookup_hits(self, request_id: str, *, timeout_seconds: float | None = None) -> LookupHits:
        """As `CacheClient.query_lookup_hits`."""
        return self._wait(self._open_client().query_lookup_hits(request_id), timeout_seconds)

    def query_status(self, request_id: str, *, timeout_seconds: float | None = None) -> LoadResult:
        """As `CacheClient.query_status`."""
        client = self._open_client()
        return self._wait(client.query_status(request_id), timeout_seconds, client.unclaim)

    def read(
        self, request_id: str, *, rank: int = 0, reader: int = 0, timeout_seconds: float | None = None
    ) -> ReadLease:
        """As `CacheClient.read`, entered: leave it by `with`, or by `release`, from any thread."""
        lease = self._open_client().read(request_id, rank=rank, reader=reader)
        return self._wait(_entered(lease), timeout_seconds, ReadLease.undo)

    def store(
        self, prompt: Prompt, *, rank: int = 0, start_chunk: int = 0, timeout_seconds: float | None = None
    ) -> RemoteWriter:
        """As `CacheClient.store`, entered: leave it by `with`, or by `close`. Chunks are committed from any thread.

        `timeout_seconds` is for entering, and once more for leaving by `with`.
        """
        writer = self._open_client().store(prompt, rank=rank, start_chunk=start_chunk)
        entered = self._wait(_entered(writer), timeout_seconds, RemoteWriter.close)
        entered.on_exit = lambda: self._wait(entered.settled(), timeout_seconds)
        return entered

    def renew(self, request_id: str, *, timeout_seconds: float | None = None) -> None:
        """As `CacheClient.renew`."""
        self._wait(self._open_client().renew(request_id), timeout_seconds)

    def end_request(self, request_id: str, *, timeout_seconds: float | None = None) -> None:
        """As `CacheClient.end_request`."""
        self._wait(self._open_client().end_request(request_id), timeout_seconds)

    def end_request_nowait(self, request_id: str) -> None:
        """The same, without waiting for the server; where there is none, or the client is closed, nothing is held."""
        check_request_id(request_id, MAX_REQUEST_ID)
        client = self._client
        if client is not None and self._pid == os.getpid():
            self._post(self._end, client, request_id)

    def _end(self, client: CacheClient, request_id: str) -> None:
        task = asyncio.get_running_loop().create_task(client.end_request(request_id))
        self._ends.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._ends.discard(task)
        if not task.cancelled():
            task.exception()  # the connection is lost, and what was held with it

    def flush(self, deadline_seconds: float | None = None) -> FlushResult:
        """As `CacheClient.flush`."""
        return self._wait(self._open_client().flush(deadline_seconds))

    def delete(self, prompt: Prompt, *, timeout_seconds: float | None = None) -> Deleted:
        """As `CacheClient.delete`."""
        return self._wait(self._open_client().delete(prompt), timeout_seconds)

    def clear(self, tier: Literal["l1", "all"] = "l1", *, timeout_seconds: float | None = None) -> Deleted:
        """As `CacheClient.clear`."""
        return self._wait(self._open_client().clear(tier), timeout_seconds)

    def stats(self, *, timeout_seconds: float | None = None) -> CacheStats:
        """As `CacheClient.stats`."""
        return self._wait(self._open_client().stats(), timeout_seconds)

    def ping(self, *, timeout_seconds: float | None = None) -> float:
        """As `CacheClient.ping`."""
        return self._wait(self._open_client().ping(), timeout_seconds)

    @property
    def memory(self) -> memoryview:
        """As `CacheClient.memory`."""
        return self._open_client().memory

    @property
    def result_ttl_seconds(self) -> float:
        """As `CacheClient.result_ttl_seconds`."""
        return self._open_client().result_ttl_seconds

    def check_connected(self) -> Link:
        """As `CacheClient.check_connected`."""
        return self._open_client().check_connected()


E = TypeVar("E", ReadLease, RemoteWriter)


async def _entered(scoped: E) -> E:
    return await scoped


async def _deliver(
    call: Coroutine[Any, Any, T],
    outcome: "concurrent.futures.Future[T]",
    give_back: Callable[[T], object] | None,
) -> None:
    try:
        value = await call
    except Exception as error:
        if outcome.set_running_or_notify_cancel():
            outcome.set_exception(error)
        return
    if outcome.set_running_or_notify_cancel():
        outcome.set_result(value)
    elif give_back is not None:
        give_back(value)


def _pass_on(to: BlockingFuture[T], outcome: "asyncio.Future[T]") -> None:
    if to.cancelled():
        return
    error = outcome.exception()
    if error is not None:
        to.set_exception(error)
    else:
        to.set_result(outcome.result())
