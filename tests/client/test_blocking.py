"""`BlockingClient`: from any thread, without waiting where nothing has to be waited for."""

import asyncio
import concurrent.futures
import gc
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from contract.support import make_prompt, pattern, verify, write

from async_cache import (
    AccessDeniedError,
    BackendState,
    BlockingClient,
    CacheClosedError,
    ConfigError,
    ConnectionLostError,
    ReadConflictError,
    RequestConflictError,
    UnknownRequestError,
    WriterClosedError,
)
from async_cache.client.client import CacheClient
from async_cache.l2.memory import MemoryBackend
from async_cache.prompt.layout import Prompt
from async_cache.testing import GatedBackend

from .servers import SECONDS, ThreadedServer, serve_in_process, serve_in_thread, short_directory, stopped

CHUNKS = 3
PROMPT = make_prompt(CHUNKS)
OTHER = make_prompt(CHUNKS, 2)
SOON = 60
"""Seconds that no test should need."""


@pytest.fixture(scope="module")
def gate() -> GatedBackend:
    return GatedBackend(MemoryBackend())


@pytest.fixture(scope="module")
def module_server(gate: GatedBackend) -> Iterator[ThreadedServer]:
    with serve_in_thread(gate) as server:
        yield server


@pytest.fixture
def server(module_server: ThreadedServer, gate: GatedBackend) -> Iterator[ThreadedServer]:
    """A server that holds nothing, over the gate."""
    yield module_server
    module_server.call(gate.release)
    module_server.run(module_server.cache.clear("all"))
    stats = module_server.run(settled(module_server))
    assert (stats.requests, stats.leases, stats.reserved_bytes) == (0, 0, 0)


async def settled(server: ThreadedServer) -> Any:
    """The statistics, once what the clients held has been given back."""
    async with asyncio.timeout(SECONDS):
        while (stats := await server.cache.stats()).requests or stats.reserved_bytes or stats.leases:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    return stats


@pytest.fixture
def client(server: ThreadedServer) -> Iterator[BlockingClient]:
    with BlockingClient(server.url) as client:
        yield client


def fill(client: BlockingClient, prompt: Prompt) -> None:
    with client.store(prompt) as writer:
        for chunk in writer:
            write(chunk, prompt)
            chunk.commit()


def in_thread(call: Callable[..., Any], *arguments: Any) -> "concurrent.futures.Future[Any]":
    """The outcome of a call in a thread of its own, which is not waited for at the end of a test."""
    outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            outcome.set_result(call(*arguments))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome


def waiting_calls(server: ThreadedServer, gate: GatedBackend, verb: Any, count: int) -> None:
    """Return when so many calls of the backend are at the gate."""
    server.run(asyncio.wait_for(gate.reached(verb, count), SECONDS))


# The whole way.


def test_a_request_from_store_to_end(client: BlockingClient) -> None:
    fill(client, PROMPT)
    prefetch = client.prefetch(PROMPT, request_id="r")
    assert prefetch.request_id == "r"
    assert prefetch.lookup_done.result(SOON).chunks == CHUNKS
    assert prefetch.load_done.result(SOON).chunks == CHUNKS
    assert client.query_lookup_hits("r").chunks == CHUNKS
    with client.read("r") as lease:
        assert verify(lease, PROMPT) == list(range(CHUNKS))
        offset = lease[0].offset
        assert bytes(client.memory[offset : offset + 16]) == pattern(PROMPT, 0)
    with pytest.raises(UnknownRequestError):
        client.query_status("r")


def test_a_request_for_segments_from_store_to_end(client: BlockingClient) -> None:
    layout = PROMPT.layout
    parts = [PROMPT, layout.segment(range(9), context=[1]), layout.segment(range(9, 13))]
    for part in parts[:2]:
        fill(client, part)
    assert [hits.chunks for hits in client.lookup_segments(parts).parts] == [CHUNKS, 2, 0]
    prefetch = client.prefetch_segments(parts, request_id="r")
    assert [hits.chunks for hits in prefetch.lookup_done.result(SOON).parts] == [CHUNKS, 2, 0]
    assert [result.chunks for result in prefetch.load_done.result(SOON).parts] == [CHUNKS, 2, 0]
    with client.read("r") as lease:
        assert [(chunk.part, chunk.index) for chunk in lease] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
        assert all(bytes(chunk.views[0]) == pattern(parts[chunk.part], chunk.index) for chunk in lease)
    with pytest.raises(UnknownRequestError):
        client.query_status("r")
    with pytest.raises(ValueError, match="1 to 256 parts"):
        client.prefetch_segments([])


def test_every_member_answers(client: BlockingClient) -> None:
    client.flush(SOON)
    fill(client, PROMPT)
    assert client.lookup(PROMPT).chunks == CHUNKS
    assert client.flush(SOON).written == CHUNKS
    assert client.prefetch(PROMPT, request_id="r", skip_tokens=4).load_done.result(SOON).start_chunk == 1
    client.renew("r")
    assert client.query_status("r").chunks == CHUNKS - 1
    client.end_request("r")
    client.end_request("r")
    assert client.stats().l1_chunks == CHUNKS
    assert client.ping() < SOON
    assert client.delete(PROMPT).chunks == CHUNKS
    assert client.clear().chunks == client.clear("all").chunks == 0
    assert client.memory.readonly


def test_backends_come_and_go(client: BlockingClient) -> None:
    there = [backend.name for backend in client.backends()]
    client.add_backend("memory://new", position=0)
    assert [backend.name for backend in client.backends()] == ["new", *there]
    assert client.drain_backend("new", deadline_seconds=SOON).state is BackendState.DRAINED
    client.remove_backend("new", timeout_seconds=SOON)
    assert [backend.name for backend in client.backends()] == there
    with pytest.raises(ConfigError, match="there is no backend 'new'"):
        client.remove_backend("new")
    with pytest.raises(TypeError, match="a backend must be a URL, not int"):
        client.add_backend(5)  # type: ignore[arg-type]


def test_request_ids_are_made_up_where_none_is_given(client: BlockingClient) -> None:
    prefetches = [client.prefetch(PROMPT) for _ in range(5)]
    assert len({prefetch.request_id for prefetch in prefetches}) == 5
    for prefetch in prefetches:
        assert prefetch.load_done.result(SOON).request_id == prefetch.request_id
        client.end_request(prefetch.request_id)


def test_a_lease_and_a_writer_are_left_by_with_or_by_a_call_from_any_thread(
    client: BlockingClient, server: ThreadedServer
) -> None:
    fill(client, PROMPT)
    client.prefetch(PROMPT, request_id="r").load_done.result(SOON)
    lease = client.read("r")
    assert verify(lease, PROMPT) == list(range(CHUNKS))
    in_thread(lease.release).result(SOON)
    lease.release()
    writer = client.store(OTHER)
    assert len(writer) == CHUNKS
    in_thread(writer.close).result(SOON)
    writer.close()
    with pytest.raises(WriterClosedError):
        writer[0].commit()
    server.run(settled(server))


def test_chunks_are_committed_from_several_threads(client: BlockingClient) -> None:
    prompt = make_prompt(32, 3)
    with client.store(prompt) as writer, ThreadPoolExecutor(8) as pool:

        def commit(chunk: Any) -> None:
            write(chunk, prompt)
            chunk.commit()

        list(pool.map(commit, writer))
    client.prefetch(prompt, request_id="r").load_done.result(SOON)
    with client.read("r") as lease:
        assert verify(lease, prompt) == list(range(32))


def test_many_threads_call_at_once(client: BlockingClient) -> None:
    began = threading.Barrier(12)

    def use(number: int) -> int:
        prompt = make_prompt(CHUNKS, 10 + number)
        began.wait(SOON)
        for turn in range(8):
            fill(client, prompt)
            prefetch = client.prefetch(prompt, request_id=f"{number}-{turn}")
            assert client.query_lookup_hits(prefetch.request_id).chunks == CHUNKS
            assert client.query_status(prefetch.request_id).chunks == CHUNKS
            with client.read(prefetch.request_id) as lease:
                assert verify(lease, prompt) == list(range(CHUNKS))
            assert prefetch.lookup_done.done() and prefetch.load_done.done()
            client.end_request(prefetch.request_id)
        return number

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(use, range(12), timeout=SECONDS)) == list(range(12))


# Without waiting.


def test_a_prefetch_returns_before_the_server_has_answered() -> None:
    with (
        short_directory() as directory,
        serve_in_process(f"unix://{directory}/s") as process,
        BlockingClient(f"unix://{directory}/s") as client,
    ):
        fill(client, PROMPT)
        assert client.lookup(PROMPT).chunks == CHUNKS
        with stopped(process):
            prefetches = [client.prefetch(PROMPT) for _ in range(100)]
            assert not any(p.lookup_done.done() or p.load_done.done() for p in prefetches)
        for prefetch in prefetches:
            assert prefetch.lookup_done.result(SOON).chunks == CHUNKS
            assert prefetch.load_done.result(SOON).chunks == CHUNKS


def test_done_needs_no_round_trip_and_next_to_nothing(
    client: BlockingClient, server: ThreadedServer, gate: GatedBackend
) -> None:
    gate.hold("lookup")
    pending = client.prefetch(PROMPT, request_id="r")
    waiting_calls(server, gate, "lookup", gate.calls["lookup"] or 1)
    done = pending.lookup_done.done

    def cost() -> int:
        """Calls that it makes, with itself, and that of what counts."""
        calls = Counter[str]()
        sys.setprofile(lambda frame, event, _: calls.update((event,)))
        done()
        sys.setprofile(None)
        return calls["call"] + calls["c_call"]

    assert cost() <= 4, "each takes a tenth of a microsecond"
    assert done() is pending.load_done.done() is False
    server.call(gate.release)
    pending.load_done.result(SOON)
    assert pending.lookup_done.done() is pending.load_done.done() is True
    assert cost() <= 4
    client.end_request("r")


def test_the_futures_resolve_without_anybody_asking(client: BlockingClient) -> None:
    told = threading.Event()
    prefetch = client.prefetch(PROMPT)
    prefetch.load_done.add_done_callback(lambda _: told.set())
    assert told.wait(SOON)
    assert prefetch.lookup_done.done() and prefetch.load_done.done()


def test_the_futures_are_those_of_the_standard_library(client: BlockingClient) -> None:
    prefetches = [client.prefetch(PROMPT) for _ in range(3)]
    futures = [future for prefetch in prefetches for future in (prefetch.lookup_done, prefetch.load_done)]
    assert concurrent.futures.wait(futures, SOON).not_done == set()
    assert len(list(concurrent.futures.as_completed(futures, SOON))) == 6


def test_a_prefetch_is_cancelled_from_any_thread(client: BlockingClient, gate: GatedBackend) -> None:
    gate.hold("lookup")
    prefetch = client.prefetch(PROMPT, request_id="r")
    in_thread(prefetch.cancel).result(SOON)
    assert prefetch.lookup_done.result(SOON).shortfall == "cancelled"
    assert prefetch.load_done.result(SOON).shortfall == "cancelled"
    prefetch.cancel()
    client.end_request("r")


def test_a_future_that_its_owner_cancels_disturbs_nothing(
    client: BlockingClient, server: ThreadedServer, gate: GatedBackend
) -> None:
    gate.hold("lookup")
    prefetch = client.prefetch(PROMPT, request_id="r")
    assert prefetch.lookup_done.cancel()
    assert prefetch.lookup_done.done()
    server.call(gate.release)
    assert prefetch.load_done.result(SOON).chunks == 0
    assert client.ping() < SOON
    client.end_request("r")


@pytest.mark.parametrize("refusal", ["by the client", "by the server"])
def test_a_prefetch_that_is_refused_ends_though_its_owner_has_cancelled_the_lookup(
    refusal: str, client: BlockingClient, server: ThreadedServer
) -> None:
    with BlockingClient(server.url) as elsewhere:
        user = client if refusal == "by the client" else elsewhere
        user.prefetch(PROMPT, request_id="r").load_done.result(SOON)
        held, cancelled = threading.Event(), threading.Event()

        def hold(_: Any) -> None:
            held.set()
            cancelled.wait(SOON)

        client.prefetch(OTHER, request_id="other").load_done.add_done_callback(hold)
        assert held.wait(SOON)
        refused = client.prefetch(OTHER, request_id="r")
        assert refused.lookup_done.cancel()
        cancelled.set()
        with pytest.raises(RequestConflictError):
            refused.load_done.result(SOON)
        assert refused.lookup_done.cancelled()
        assert refused.lookup_done.done(), "also once those who wait were told"
        user.end_request("r")
    client.end_request("other")


# Waiting.


@pytest.mark.parametrize("call", ["lookup", "query_lookup_hits", "query_status", "read"])
def test_a_wait_that_is_too_long_raises_and_is_given_up_on_the_server(
    call: str, client: BlockingClient, server: ThreadedServer, gate: GatedBackend
) -> None:
    gate.hold("lookup")
    client.prefetch(PROMPT, request_id="r")
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        getattr(client, call)(PROMPT if call == "lookup" else "r", timeout_seconds=0.05)
    assert 0.05 <= time.monotonic() - began < SOON
    client.ping()
    server.call(gate.release)
    assert client.lookup(PROMPT, timeout_seconds=SOON).chunks == 0
    assert client.query_status("r", timeout_seconds=SOON).chunks == 0, "the result is for who asks next"
    client.end_request("r")


class Late(concurrent.futures.Future):  # type: ignore[type-arg]
    """A future whose outcome comes in the moment in which its waiter gives up."""

    def result(self, timeout: float | None = None) -> Any:
        if timeout is None:
            return super().result(SOON)
        super().result(SOON)
        raise TimeoutError


@pytest.mark.parametrize("call", ["query_status", "read", "stream"])
def test_what_comes_as_its_waiter_gives_up_is_not_lost(
    call: str, client: BlockingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(client, PROMPT)
    client.prefetch(PROMPT, request_id="r").load_done.result(SOON)
    got = None
    with monkeypatch.context() as patch, suppress(TimeoutError):
        patch.setattr(concurrent.futures, "Future", Late)
        got = getattr(client, call)("r", timeout_seconds=0.01)
    got = got or getattr(client, call)("r", timeout_seconds=SOON)
    if call in ("read", "stream"):
        assert [bytes(chunk.views[0]) for chunk in got] == [pattern(PROMPT, n) for n in range(CHUNKS)]
        got.release()
    else:
        assert got.chunks == CHUNKS
        client.end_request("r")


def test_a_thread_gets_chunks_as_they_come(client: BlockingClient, server: ThreadedServer, gate: GatedBackend) -> None:
    longer = make_prompt(CHUNKS + 2)
    fill(client, longer)
    client.flush()
    client.clear()
    fill(client, PROMPT)
    gate.hold("load")
    prefetch = client.prefetch(longer, request_id="r")
    with client.stream("r", timeout_seconds=0.2) as stream:
        chunks = iter(stream)
        came = [next(chunks) for _ in range(CHUNKS)]
        assert [bytes(chunk.views[0] or b"") for chunk in came] == [pattern(longer, n) for n in range(CHUNKS)]
        with pytest.raises(TimeoutError):
            next(chunks)
        with pytest.raises(RuntimeError):
            _ = stream.result
        server.call(gate.release)
        assert [chunk.index for chunk in stream] == list(range(CHUNKS + 2))  # from the first on, or where it was
        assert stream.result == prefetch.load_done.result(SOON)
        assert verify(stream.lease, longer) == list(range(CHUNKS + 2))
    with pytest.raises(RuntimeError, match="released"):
        next(iter(stream))


def test_a_call_in_the_clients_own_thread_that_would_wait_for_ever_is_refused(client: BlockingClient) -> None:
    outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def call(_: Any) -> None:
        try:
            outcome.set_result(client.stats())
        except Exception as error:
            outcome.set_exception(error)

    client.prefetch(PROMPT).load_done.add_done_callback(call)
    with pytest.raises(RuntimeError, match="the client's own thread"):
        outcome.result(SOON)


def test_the_next_prefetch_may_be_made_as_one_is_done(client: BlockingClient) -> None:
    """`prefetch` does not wait."""
    outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def call(_: Any) -> None:
        try:
            outcome.set_result(client.prefetch(OTHER))
        except Exception as error:
            outcome.set_exception(error)

    client.prefetch(PROMPT).load_done.add_done_callback(call)
    assert outcome.result(SOON).load_done.result(SOON).chunks == 0


def test_a_client_may_be_closed_as_a_prefetch_is_done(server: ThreadedServer) -> None:
    """`close` does not wait for the thread that it is called in."""
    outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()
    client = BlockingClient(server.url).open()

    def call(_: Any) -> None:
        try:
            outcome.set_result(client.close())
        except Exception as error:
            outcome.set_exception(error)

    client.prefetch(PROMPT).load_done.add_done_callback(call)
    assert outcome.result(SOON) is None
    client.close()
    with pytest.raises(CacheClosedError, match="was closed"):
        client.ping()


def test_a_wait_may_be_of_any_length(client: BlockingClient) -> None:
    assert client.ping(timeout_seconds=1e308) < SOON


# Errors.


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"prompt": [1, 2, 3]}, TypeError),
        ({"prompt": None}, TypeError),
        ({"request_id": ""}, ValueError),
        ({"request_id": "r" * 257}, ValueError),
        ({"request_id": 5}, TypeError),
        ({"skip_tokens": -1}, ValueError),
        ({"skip_tokens": 1.5}, TypeError),
        ({"ranks": [1]}, ValueError),
        ({"ranks": [0, 0]}, ValueError),
        ({"deadline_seconds": -1}, ValueError),
        ({"deadline_seconds": float("nan")}, ValueError),
        ({"deadline_seconds": "1"}, TypeError),
    ],
    ids=repr,
)
def test_a_bad_argument_of_a_prefetch_raises_in_the_callers_thread(
    arguments: dict[str, Any], error: type[Exception], client: BlockingClient
) -> None:
    with pytest.raises(error):
        client.prefetch(**{"prompt": PROMPT} | arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"request_id": "\ud800"}, {"skip_tokens": 2**70}, {"skip_tokens": 2**63}, {"deadline_seconds": 2**70}],
    ids=repr,
)
def test_what_can_not_be_sent_is_told_and_not_waited_for_in_vain(
    arguments: dict[str, Any], client: BlockingClient
) -> None:
    try:
        prefetch = client.prefetch(PROMPT, **arguments)
    except ValueError:
        return
    for future in (prefetch.lookup_done, prefetch.load_done):
        error = future.exception(SOON)
        assert not isinstance(error, ConnectionLostError)


def test_errors_of_other_calls_raise_in_the_callers_thread(client: BlockingClient) -> None:
    prompt: Any = [1, 2, 3]
    for call in (client.lookup, client.store, client.delete):
        with pytest.raises(TypeError):
            call(prompt)
    with pytest.raises(ValueError, match="rank 5"):
        client.store(PROMPT, rank=5)
    with pytest.raises(ValueError, match="tier"):
        client.clear("l2")  # type: ignore[arg-type]
    with pytest.raises(UnknownRequestError):
        client.query_status("nobody")
    with pytest.raises(UnknownRequestError):
        client.read("nobody")
    fill(client, PROMPT)
    client.prefetch(PROMPT, request_id="r").load_done.result(SOON)
    lease = client.read("r")
    with pytest.raises((ReadConflictError, UnknownRequestError)):
        client.read("r")
    lease.release()


def test_a_conflict_reaches_the_futures(client: BlockingClient, server: ThreadedServer, gate: GatedBackend) -> None:
    gate.hold("lookup")
    with BlockingClient(server.url) as elsewhere:
        client.prefetch(PROMPT, request_id="r")
        client.ping()
        for other in (client, elsewhere):
            conflict = other.prefetch(OTHER, request_id="r")
            for future in (conflict.lookup_done, conflict.load_done):
                with pytest.raises(RequestConflictError):
                    future.result(SOON)
    client.end_request("r")


# Opening and closing.


def test_what_keeps_a_client_from_opening_raises_where_it_is_opened(server: ThreadedServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        BlockingClient("localhost:7000").open()
    with pytest.raises(ConnectionLostError, match="there is no server at"):
        BlockingClient("unix:///none/s", connect_timeout_seconds=0.05).open()
    client = BlockingClient(server.url, token="token-of-nobody")
    with pytest.raises(AccessDeniedError):
        client.open()
    with pytest.raises(CacheClosedError):
        client.ping()
    client.close()


def calls(client: BlockingClient) -> list[Callable[[], Any]]:
    return [
        lambda: client.prefetch(PROMPT),
        lambda: client.lookup(PROMPT),
        lambda: client.query_lookup_hits("r"),
        lambda: client.query_status("r"),
        lambda: client.read("r"),
        lambda: client.store(PROMPT),
        lambda: client.renew("r"),
        lambda: client.end_request("r"),
        client.flush,
        lambda: client.delete(PROMPT),
        client.clear,
        client.stats,
        client.ping,
        lambda: client.memory,
    ]


def test_every_call_before_open_and_after_close_is_refused(server: ThreadedServer) -> None:
    client = BlockingClient(server.url)
    client.close()
    for call in calls(client):
        with pytest.raises(CacheClosedError):
            call()
    client = BlockingClient(server.url).open()
    with pytest.raises(CacheClosedError, match="a client is opened once"):
        client.open()
    client.close()
    client.close()
    for call in calls(client):
        with pytest.raises(CacheClosedError):
            call()
    with pytest.raises(CacheClosedError, match="a client is opened once"):
        client.open()


def test_close_tells_those_who_wait_in_other_threads(server: ThreadedServer, gate: GatedBackend) -> None:
    gate.hold("lookup")
    client = BlockingClient(server.url).open()
    prefetch = client.prefetch(PROMPT, request_id="r")
    before = gate.calls["lookup"]
    waits = [in_thread(call) for call in (lambda: client.lookup(PROMPT), lambda: client.query_status("r"))]
    waits += [in_thread(client.read, "r"), in_thread(client.stream, "r"), prefetch.lookup_done, prefetch.load_done]
    waiting_calls(server, gate, "lookup", before + 1)
    client.ping()
    client.close()
    for wait in waits:
        assert isinstance(wait.exception(SOON), CacheClosedError)
    assert not any(thread.name == "async_cache client" for thread in threading.enumerate())


def test_close_in_several_threads_at_once_returns_in_all(server: ThreadedServer) -> None:
    for _ in range(10):
        client = BlockingClient(server.url).open()
        for closing in [in_thread(client.close) for _ in range(4)]:
            closing.result(SOON)


class ClosedBetween(BlockingClient):
    """Another thread closes it in the middle of a call."""

    between = False

    def _opened(self) -> CacheClient:
        client = super()._opened()
        if self.between:
            self.close()
        return client


@pytest.mark.parametrize("member", ["prefetch", "stats", "read", "stream", "store"])
def test_a_call_that_is_overtaken_by_a_close_is_told(member: str, server: ThreadedServer) -> None:
    client = ClosedBetween(server.url).open()
    client.between = True
    arguments: dict[str, Any] = {"prefetch": [PROMPT], "store": [PROMPT], "read": ["r"], "stream": ["r"]}
    call = in_thread(getattr(client, member), *arguments.get(member, []))
    if member == "prefetch":
        prefetch = call.result(SOON)
        for future in (prefetch.lookup_done, prefetch.load_done):
            assert isinstance(future.exception(SOON), CacheClosedError)
    else:
        assert isinstance(call.exception(SOON), CacheClosedError)


def test_no_call_hangs_while_another_thread_closes(server: ThreadedServer) -> None:
    for turn in range(10):
        client = BlockingClient(server.url).open()
        ready = threading.Barrier(5)

        def use(client: BlockingClient = client, ready: threading.Barrier = ready) -> None:
            ready.wait(SOON)
            with suppress(CacheClosedError):
                while True:
                    client.prefetch(PROMPT).lookup_done.result(SOON)
                    client.ping()

        uses = [in_thread(use) for _ in range(4)]
        ready.wait(SOON)
        time.sleep(0.0005 * turn)
        client.close()
        for each in uses:
            assert each.exception(SOON) is None


def test_what_is_held_as_it_closes_is_given_back_and_may_be_let_go_of_later(server: ThreadedServer) -> None:
    client = BlockingClient(server.url).open()
    fill(client, PROMPT)
    prefetch = client.prefetch(PROMPT, request_id="r")
    prefetch.load_done.result(SOON)
    lease, writer = client.read("r"), client.store(OTHER)
    client.close()
    server.run(settled(server))
    lease.release()
    writer.close()
    prefetch.cancel()
    with pytest.raises(WriterClosedError):
        writer[0].commit()


def test_what_was_committed_before_the_close_is_there(server: ThreadedServer) -> None:
    with BlockingClient(server.url) as client:
        fill(client, PROMPT)
    assert server.run(server.cache.lookup(PROMPT)).chunks == CHUNKS


def dropped(client: BlockingClient) -> threading.Thread:
    """The thread of a client that nobody else has."""
    thread = client._thread._thread
    assert thread is not None
    return thread


def let_go(held: list[Any], thread: threading.Thread) -> None:
    """Have nothing of that any more; the thread ends."""
    held.clear()
    end = time.monotonic() + SECONDS
    while thread.is_alive():
        assert time.monotonic() < end
        gc.collect()
        thread.join(0.01)


def test_a_client_that_is_dropped_while_it_is_open_closes_with_a_warning(server: ThreadedServer) -> None:
    held = [BlockingClient(server.url).open()]
    thread = dropped(held[0])
    with pytest.warns(ResourceWarning, match="a BlockingClient was not closed"):
        let_go(held, thread)


def test_a_client_that_was_closed_or_not_opened_is_dropped_without_a_warning(server: ThreadedServer) -> None:
    with warnings.catch_warnings(record=True) as caught:
        with BlockingClient(server.url):
            pass
        BlockingClient(server.url)
        gc.collect()
    assert not caught


def test_what_a_client_has_given_out_keeps_it(server: ThreadedServer) -> None:
    client = BlockingClient(server.url).open()
    with client.store(PROMPT) as writer:
        for chunk in writer:
            write(chunk, PROMPT)
            chunk.commit()
    del chunk
    lease = client.read(client.prefetch(PROMPT).load_done.result(SOON).request_id)
    held = [lease, client.stream(client.prefetch(PROMPT).request_id), client.store(OTHER), client.events()]
    thread = dropped(client)
    del client, writer, lease
    with warnings.catch_warnings(record=True) as caught:
        gc.collect()
        assert verify(held[0], PROMPT) == [0, 1, 2] and held[0].held and len(list(held[1])) == CHUNKS
        held[0].release()
        held[1].release()
        held[2].close()
        held[3].close()
        assert not caught and thread.is_alive()
    with pytest.warns(ResourceWarning, match="a BlockingClient was not closed"):
        let_go(held, thread)


@pytest.mark.parametrize("only_future", [False, True])
def test_a_prefetch_keeps_its_client_until_it_has_loaded(
    server: ThreadedServer, gate: GatedBackend, only_future: bool
) -> None:
    client = BlockingClient(server.url).open()
    gate.hold("lookup")
    try:
        prefetch = client.prefetch(PROMPT)
        future = prefetch.load_done
        held: list[Any] = [future] if only_future else [future, prefetch]
        thread = dropped(client)
        del client, prefetch
        gc.collect()
        assert not future.done()

        def load_and_let_go() -> None:
            gate.release("lookup")
            assert future.result(SOON).chunks == 0
            let_go(held, thread)

        with pytest.warns(ResourceWarning, match="a BlockingClient was not closed"):
            load_and_let_go()
    finally:
        gate.release("lookup")


def test_a_connection_that_is_lost_is_told_and_comes_back() -> None:
    with short_directory() as directory:
        url = f"unix://{directory}/s"
        with serve_in_process(url) as process:
            client = BlockingClient(url).open()
            with stopped(process):
                prefetch = client.prefetch(PROMPT)
                asking = in_thread(client.ping)
                process.kill()
            for future in (prefetch.lookup_done, prefetch.load_done, asking):
                assert isinstance(future.exception(SOON), ConnectionLostError)
            process.wait()
        with serve_in_process(url):
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                with suppress(ConnectionLostError):
                    client.ping()
                    break
            fill(client, PROMPT)
            assert client.prefetch(PROMPT).load_done.result(SOON).chunks == CHUNKS
            client.close()


def test_where_no_file_can_be_opened_who_opens_a_client_hears_of_it() -> None:
    program = (
        "import os, resource\n"
        "from async_cache import BlockingClient, ConnectionLostError\n"
        "client = BlockingClient('unix:///nowhere')\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) - 1,) * 2)\n"
        "try:\n"
        "    client.open()\n"
        "except ConnectionLostError as error:\n"
        "    print(error, flush=True)\n"
        "os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=SECONDS, check=True)
    assert "open files" in done.stdout
