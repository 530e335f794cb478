"""A claim that is given up at whichever step of the loop, at either end and over either transport, loses no result."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from contract.support import fill_l2, make_prompt, read_back
from faults.striking import Blow, PlainLoop, RealLoop, cancel_again_and_again, strike
from soak import rounds

from async_cache import AsyncCache, CacheClient, CacheConfig, LoadResult, ServerConfig, UnknownRequestError, connect
from async_cache.l2.memory import MemoryBackend
from async_cache.server import Server
from async_cache.testing import ThrottledBackend

from .support import given_back

PROMPT, ABSENT = make_prompt(3), make_prompt(2, 2)
STRIDE = rounds(quick=5, long=1)
LOOPS = {"asyncio": PlainLoop, "uvloop": RealLoop}


def urls(tmp_path: Path) -> dict[str, str]:
    return {"unix": f"unix://{tmp_path}/s", "tcp": "tcp://127.0.0.1:0"}


@asynccontextmanager
async def two_clients(url: str) -> AsyncIterator[tuple[CacheClient, CacheClient]]:
    """Of a server whose storage takes its time."""
    backend = ThrottledBackend(MemoryBackend(), latency_seconds=0.002)
    async with (
        AsyncCache(CacheConfig(l1_bytes=2**20, l2=[]), [backend]) as cache,
        Server(cache, ServerConfig(listen=[url])) as server,
        connect(str(server.addresses[0])) as first,
        connect(str(server.addresses[0])) as second,
    ):
        await fill_l2(cache, PROMPT)
        yield first, second
        cache.check_integrity()


async def claim(client: CacheClient, request_id: str) -> LoadResult:
    return await client.query_status(request_id)


async def claim_soon(client: CacheClient, request_id: str) -> LoadResult:
    """Where the result may have come already, and the first query that is asked is answered at once."""
    await client.query_lookup_hits(request_id)
    return await client.query_status(request_id)


async def trial(
    url: str, chunks: int, work: Callable[..., Coroutine[Any, Any, LoadResult]], blow: Blow, steps: int
) -> bool:
    """Whether the blow fell before the claim was there."""
    async with two_clients(url) as (first, second):
        prefetch = first.prefetch(PROMPT if chunks else ABSENT)
        task, struck = await strike(work(first, prefetch.request_id), steps, blow)
        assert task.cancelled() == struck
        if struck and chunks and steps % 2:  # it is for whoever asks next, through whichever client
            await first.ping()
            result = await asyncio.wait_for(second.query_status(prefetch.request_id), 60)
        else:
            result = await asyncio.wait_for(first.query_status(prefetch.request_id), 60) if struck else task.result()
        assert result.chunks == chunks
        await nothing_is_left(first, second, prefetch.request_id)
    return struck


async def trial_of_two(
    url: str, chunks: int, work: Callable[..., Coroutine[Any, Any, LoadResult]], blow: Blow, steps: int
) -> bool:
    """The same where another task claims it through the same client: one of the two gets it."""
    async with two_clients(url) as (first, second):
        prefetch = first.prefetch(PROMPT if chunks else ABSENT)
        other = asyncio.create_task(claim(first, prefetch.request_id))
        task, struck = await strike(work(first, prefetch.request_id), steps, blow)
        assert task.cancelled() == struck
        ended = await asyncio.wait_for(asyncio.gather(task, other, return_exceptions=True), 60)
        assert [result.chunks for result in ended if isinstance(result, LoadResult)] == [chunks]
        assert {type(error) for error in ended} <= {LoadResult, asyncio.CancelledError, UnknownRequestError}
        await nothing_is_left(first, second, prefetch.request_id)
    return struck


async def nothing_is_left(first: CacheClient, second: CacheClient, request_id: str) -> None:
    """Nobody else gets the result, and nothing is held any more once the request has ended."""
    for client in (first, second):
        with pytest.raises(UnknownRequestError):
            await asyncio.wait_for(client.query_status(request_id), 60)
    await first.end_request(request_id)
    await given_back(first)
    assert await read_back(second, PROMPT) == 3


@pytest.mark.parametrize("attempt", [trial, trial_of_two])
@pytest.mark.parametrize("blow", [asyncio.Task.cancel, cancel_again_and_again])
@pytest.mark.parametrize("work", [claim, claim_soon])
@pytest.mark.parametrize("chunks", [0, 3])
@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_a_claim_that_is_cancelled_at_any_step_loses_no_result(
    tmp_path: Path, loop: Callable[[], Any], transport: str, chunks: int, work: Any, blow: Blow, attempt: Any
) -> None:
    for steps in count(1, STRIDE):
        with asyncio.Runner(loop_factory=loop) as runner:
            if not runner.run(attempt(urls(tmp_path)[transport], chunks, work, blow, steps)):
                break
    assert steps > STRIDE
