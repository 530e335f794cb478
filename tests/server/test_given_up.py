"""Who asks why, lists what there is, or reads events or metrics, and leaves at whichever step of the loop.

Nothing is lost to those who go on, and nothing is held for those who have left; embedded and over both transports.
"""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from contract.support import assert_nothing_held, fill, fill_l2, make_prompt
from faults.striking import Blow, PlainLoop, RealLoop, cancel_again_and_again, strike
from soak import rounds

from async_cache import AsyncCache, CacheClient, CacheConfig, EventStream, ServerConfig, Stored, connect
from async_cache.config import http_address
from async_cache.l2.memory import MemoryBackend
from async_cache.metrics import Watch
from async_cache.server import Server
from async_cache.server.access import tenant_of
from async_cache.server.http.serving import HTTPServer
from async_cache.testing import ThrottledBackend
from async_cache.values import Event

STRIDE = rounds(quick=3, long=1)
LOOPS = {"asyncio": PlainLoop, "uvloop": RealLoop}
IN_L1, IN_L2 = make_prompt(2, 1), make_prompt(3, 2)
TCP = "tcp://127.0.0.1:0"
Member = AsyncCache | CacheClient


@asynccontextmanager
async def opened(url: str | None) -> AsyncIterator[tuple[AsyncCache, Server, Member]]:
    """A cache whose storage takes its time, a server of it, and its client; without a URL, the cache once more."""
    backend = ThrottledBackend(MemoryBackend(), latency_seconds=0.001)
    async with (
        AsyncCache(CacheConfig(l1_bytes=2**20, l2=[]), [backend]) as cache,
        Server(cache, ServerConfig(listen=[url or TCP])) as server,
    ):
        await fill_l2(cache, IN_L2)
        await fill(cache, IN_L1)
        await cache.flush()
        if url is None:
            yield cache, server, cache
            return
        async with connect(str(server.addresses[0])) as client:
            await client.ping()
            yield cache, server, client


async def nothing_is_left(cache: AsyncCache, server: Server, member: Member, tasks: "set[asyncio.Task[Any]]") -> None:
    """No lease, pin, listing, turn or task of what was given up, at either end."""
    for _ in range(60_000):
        if isinstance(member, CacheClient):
            await member.ping()
        else:
            await asyncio.sleep(0.001)
        left = asyncio.all_tasks() - tasks
        busy = [session for session in server._sessions if session._tasks or session.held]
        if not left and not busy and not any(guard.uses for guard in cache.core.guards):
            break
    else:
        pytest.fail(f"{left} and {busy} are left, {[guard.uses for guard in cache.core.guards]} uses")
    await assert_nothing_held(cache)
    for guard in cache.core.guards:
        assert guard.backend.inner.pins == 0  # type: ignore[attr-defined]
    if isinstance(member, CacheClient):
        assert member._links.current is not None and member._links.current.calls == {}


async def explain(member: Member) -> Any:
    return await member.explain(IN_L2)


async def roots(member: Member) -> Any:
    return await member.roots() if isinstance(member, CacheClient) else None


async def in_memory(member: Member) -> Any:
    return await member.chunks() if isinstance(member, CacheClient) else None


async def in_storage(member: Member) -> Any:
    return await member.chunks(backend="memory") if isinstance(member, CacheClient) else None


async def statistics(member: Member) -> Any:
    return await member.stats(), await member.backends(), await member.retained()


async def trial(url: str | None, work: Callable[[Member], Coroutine[Any, Any, Any]], blow: Blow, steps: int) -> bool:
    """Whether the blow fell before the answer was there."""
    async with opened(url) as (cache, server, member):
        wanted, tasks = await work(member), asyncio.all_tasks()
        task, struck = await strike(work(member), steps, blow)
        assert task.cancelled() == struck
        await nothing_is_left(cache, server, member, tasks)
        again = await asyncio.wait_for(work(member), 60)
        if work is not statistics:
            assert again == wanted
    return struck


@pytest.mark.parametrize("blow", [asyncio.Task.cancel, cancel_again_and_again])
@pytest.mark.parametrize("work", [explain, roots, in_memory, in_storage, statistics])
@pytest.mark.parametrize("transport", ["embedded", "unix", "tcp"])
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_a_question_that_is_given_up_at_any_step_leaves_nothing_behind(
    tmp_path: Path, loop: Callable[[], Any], transport: str, work: Any, blow: Blow
) -> None:
    if transport == "embedded" and work not in (explain, statistics):
        pytest.skip("that is asked of a server")
    for steps in count(1, STRIDE):
        with asyncio.Runner(loop_factory=loop) as runner:
            if not runner.run(trial(url_of(tmp_path, transport), work, blow, steps)):
                break
    assert steps > STRIDE


def url_of(directory: Path, transport: str) -> str | None:
    return {"embedded": None, "unix": f"unix://{directory}/s", "tcp": TCP}[transport]


# Events.


async def take(events: EventStream, taken: list[Event], most: int) -> None:
    while len(taken) < most:
        taken.append(await anext(events))


async def reader_trial(url: str | None, blow: Blow, steps: int) -> bool:
    """Whether the blow fell before the reader was done; the next one goes on where it was."""
    async with opened(url) as (cache, server, member):
        tasks = asyncio.all_tasks()
        events, taken = member.events(), list[Event]()
        prompt = make_prompt(5, 3)

        async def read_while_it_is_stored() -> None:
            reading = asyncio.ensure_future(take(events, taken, 10))
            try:
                await fill(member, prompt)
                await reading
            finally:
                reading.cancel()

        task, struck = await strike(read_while_it_is_stored(), steps, blow)
        assert task.cancelled() == struck
        await fill(member, prompt)
        await asyncio.wait_for(take(events, taken, 10), 60)
        stored = [event for event in taken if isinstance(event, Stored)]
        for tier in ("l1", "l2"):
            hashes = [event.chunk_hash for event in stored if event.tier == tier]
            assert hashes == list(prompt.chunk_hashes)
        await events.aclose()
        await nothing_is_left(cache, server, member, tasks)
    return struck


async def subscriber_trial(url: str | None, blow: Blow, steps: int) -> bool:
    """Whether the blow fell before the stream was closed: it is gone then, at either end."""
    async with opened(url) as (cache, server, member):
        tasks = asyncio.all_tasks()

        async def subscribe() -> None:
            async with member.events() as events:
                await fill(member, make_prompt(1, 4))
                await anext(events)

        task, struck = await strike(subscribe(), steps, blow)
        assert task.cancelled() == struck
        await nothing_is_left(cache, server, member, tasks)
    return struck


@pytest.mark.parametrize("attempt", [reader_trial, subscriber_trial])
@pytest.mark.parametrize("blow", [asyncio.Task.cancel, cancel_again_and_again])
@pytest.mark.parametrize("transport", ["embedded", "unix", "tcp"])
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_events_that_are_given_up_at_any_step_are_for_the_next_reader_or_gone(
    tmp_path: Path, loop: Callable[[], Any], transport: str, blow: Blow, attempt: Any
) -> None:
    for steps in count(1, STRIDE):
        with asyncio.Runner(loop_factory=loop) as runner:
            if not runner.run(attempt(url_of(tmp_path, transport), blow, steps)):
                break
    assert steps > STRIDE
    gc.collect()


# Over HTTP.

QUESTIONS = {
    "metrics": b"GET /metrics HTTP/1.1\r\n",
    "status": b"GET /status HTTP/1.1\r\n",
    "explain": b"GET /explain?model=model&tokens=1,2,3,4 HTTP/1.1\r\n",
}


async def answer(port: int, question: bytes, writers: "list[asyncio.StreamWriter] | None" = None) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    if writers is not None:
        writers.append(writer)
    try:
        writer.write(question + b"Host: 127.0.0.1\r\nConnection: close\r\n\r\n")
        return await reader.read()
    finally:
        writer.close()


async def web_trial(question: bytes, steps: int, *, abort: bool) -> bool:
    """Whether the connection was given up before the answer was there."""
    async with opened(None) as (cache, server, member):
        watch = Watch(cache.core, tenant_of)
        http = HTTPServer(server, watch)
        http.open(http_address("127.0.0.1:0"))
        try:
            assert http.address is not None
            port = http.address.port
            expected = (await answer(port, question)).split(b"\r\n")[0]
            tasks, writers = asyncio.all_tasks(), list[asyncio.StreamWriter]()

            def leave(task: "asyncio.Task[Any]") -> None:
                task.cancel()
                for writer in writers if abort else ():
                    writer.transport.abort()

            _, struck = await strike(answer(port, question, writers), steps, leave)
            assert http._uvicorn is not None
            state = http._uvicorn.server_state
            while state.connections or state.tasks:  # noqa: ASYNC110 (it tells nobody)
                await asyncio.sleep(0.001)
            await nothing_is_left(cache, server, member, tasks)
            assert (await answer(port, question)).split(b"\r\n")[0] == expected
        finally:
            await http.close()
            await watch.close()
    return struck


@pytest.mark.parametrize("abort", [False, True])
@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_who_leaves_at_any_step_of_an_answer_over_http_leaves_nothing_behind(
    loop: Callable[[], Any], question: bytes, abort: bool
) -> None:
    for steps in count(1, STRIDE):
        with asyncio.Runner(loop_factory=loop) as runner:
            if not runner.run(web_trial(question, steps, abort=abort)):
                break
    assert steps > STRIDE
