"""Calls: what each kind makes of its answers, of the end of its connection, and of a caller that gives it up."""

import asyncio
import ctypes
from collections.abc import AsyncIterator
from typing import Any

import pytest
from contract.support import OBJECT_BYTES, fill, make_prompt, write

from async_cache import AsyncCache, CacheClient, ConnectionLostError, ProtocolError, WriterClosedError, connect
from async_cache.client.calls import (
    Commit,
    PrefetchCall,
    PrefetchState,
    Question,
    ReadCall,
    StoreCall,
    StoreState,
)
from async_cache.client.link import Link
from async_cache.protocol import messages
from async_cache.values import LoadResult

from .servers import serve, short_directory

PROMPT = make_prompt(3)
LOST = ConnectionLostError("for the test")
RESULT = LoadResult(request_id="r", start_chunk=0, chunks=1, tokens=4, l1_chunks=1, l2_chunks=0)
FAILED = messages.Failed(1, "limit", "too many")


def acquired(data_bytes: int) -> messages.ReadAcquired:
    return messages.ReadAcquired(1, RESULT, 0, [0], [], data_bytes, data_bytes)


@pytest.fixture
async def pair() -> AsyncIterator[tuple[AsyncCache, CacheClient]]:
    """A cache, and a client of its server."""
    with short_directory() as directory:
        url = f"unix://{directory}/s"
        async with serve(url) as (cache, _), connect(url) as client:
            yield cache, client


def link_of(client: CacheClient) -> Link:
    link = client._links.current
    assert link is not None
    return link


class Handle:
    """A writer's handle, which only knows whether it was expired."""

    expired = False

    def expire(self) -> None:
        self.expired = True


# One by one.


async def test_a_question_has_one_answer() -> None:
    question = Question()
    assert question.on(messages.Done(1))
    assert await question.answer == messages.Done(1)
    question.lost(LOST)
    assert await question.answer == messages.Done(1)


@pytest.mark.parametrize("kind", [Question, ReadCall, lambda: StoreCall(Handle())])  # type: ignore[arg-type]
async def test_what_the_server_fails_and_what_is_lost_raises_where_it_is_waited_for(kind: Any) -> None:
    for end in (lambda call: call.on(FAILED), lambda call: call.lost(LOST)):
        call = kind()
        assert end(call) is not False
        assert isinstance(call.answer.exception(), Exception)


async def test_a_read_is_answered_when_its_last_bytes_are_there() -> None:
    read = ReadCall()
    assert not read.on(acquired(4))
    assert not read.on(messages.ReadData(1, 2, memoryview(b"cd")))
    assert not read.answer.done()
    assert read.on(messages.ReadData(1, 0, memoryview(b"ab")))
    assert (await read.answer).result == RESULT
    assert read.buffer == b"abcd"


async def test_a_read_whose_bytes_are_mapped_has_no_buffer() -> None:
    read = ReadCall()
    assert read.on(acquired(0))
    assert (await read.answer).result == RESULT and read.buffer is None


async def test_bytes_that_do_not_fit_into_a_read_are_an_error() -> None:
    read = ReadCall()
    with pytest.raises(ProtocolError):
        read.on(messages.ReadData(1, 0, memoryview(b"early")))
    read.on(acquired(4))
    with pytest.raises(ProtocolError):
        read.on(messages.ReadData(1, 2, memoryview(b"long")))


async def test_a_read_that_nobody_waits_for_keeps_no_buffer() -> None:
    read = ReadCall()
    read.answer.cancel()
    assert read.on(acquired(4))
    assert read.buffer is None


@pytest.mark.parametrize("end", [lambda store: store.on(messages.StoreClosed(1)), lambda store: store.lost(LOST)])
async def test_a_store_expires_its_writer_once_it_is_open(end: Any) -> None:
    handle = Handle()
    store = StoreCall(handle)  # type: ignore[arg-type]
    assert not store.on(messages.StoreReserved(1, [0]))
    assert store.state is StoreState.OPEN and not handle.expired
    end(store)
    assert store.state is StoreState.CLOSED and handle.expired
    assert store.close() is None, "the server need not be told"


async def test_a_commit_that_fails_or_is_lost_has_ended_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    for answer in (messages.Done(1), FAILED, messages.Failed(1, "writer_closed", "late"), None):
        under_way: set[asyncio.Future[None]] = set()
        commit = Commit((ctypes.c_ubyte * 8)(), under_way)
        assert under_way == {commit.answered}
        if answer is None:
            commit.lost(LOST)
        else:
            assert commit.on(answer)
        assert commit.answered.done() and not under_way
    assert [record.getMessage() for record in caplog.records] == ["a chunk could not be committed: too many"]


async def test_a_prefetch_is_told_until_its_request_is_over() -> None:
    call = PrefetchCall(None, "r", PROMPT, 0, (0,))
    assert not call.on(messages.LoadDone(1, RESULT))
    assert await call.prefetch.load_done == RESULT
    assert not call.on(messages.RequestClaimed(1, True)) and call.state is PrefetchState.CLAIMED
    assert not call.on(messages.RequestClaimed(1, False)) and call.state is PrefetchState.OPEN
    call.state = PrefetchState.LEFT
    assert not call.on(messages.RequestClaimed(1, False)) and call.state is PrefetchState.LEFT
    assert call.on(messages.RequestOver(1))


# On a link.


async def test_nothing_is_left_of_calls_that_have_been_answered(pair: tuple[AsyncCache, CacheClient]) -> None:
    _, client = pair
    await fill(client, PROMPT)
    await client.prefetch(PROMPT, request_id="r").load_done
    async with client.read("r") as lease:
        assert len(lease) == 3
    await client.end_request("r")
    await client.ping()
    link = link_of(client)
    assert (link.calls, link.requests, link.claims._calls) == ({}, {}, {})


async def test_a_caller_that_is_cancelled_as_its_room_is_reserved_leaves_none_behind(
    pair: tuple[AsyncCache, CacheClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, client = pair
    on = StoreCall.on

    def on_and_cancel(call: StoreCall, answer: Any) -> bool:
        over = on(call, answer)
        opening.cancel()
        return over

    monkeypatch.setattr(StoreCall, "on", on_and_cancel)
    writer = client.store(PROMPT)
    opening = asyncio.ensure_future(writer.__aenter__())
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert link_of(client).calls == {}
    await client.ping()
    assert (await cache.stats()).reserved_bytes == 0
    monkeypatch.undo()
    async with writer:
        assert writer.is_open and len(writer) == 3, "it may be opened again"


async def test_a_writer_whose_connection_is_lost_with_the_answer_is_closed(
    pair: tuple[AsyncCache, CacheClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, client = pair
    on, link = StoreCall.on, link_of(client)

    def on_and_lose(call: StoreCall, answer: Any) -> bool:
        over = on(call, answer)
        link._connection_lost(None)
        return over

    monkeypatch.setattr(StoreCall, "on", on_and_lose)
    async with client.store(PROMPT) as writer:
        assert not writer.is_open
        with pytest.raises(WriterClosedError):
            writer[0].commit()
        with pytest.raises(WriterClosedError):
            _ = writer[0].views
    link.connection.abort()


async def test_a_block_is_free_when_its_writer_has_left_though_the_handle_is_kept(
    pair: tuple[AsyncCache, CacheClient],
) -> None:
    _, client = pair
    offsets = []
    kept = []
    for number in (1, 2):
        writer = await client.store(make_prompt(1, number))
        writer[0].views[0][:] = bytes(OBJECT_BYTES)  # type: ignore[index]
        offsets.append(writer[0].offset)
        writer.close()
        kept.append(writer)
    assert offsets[0] is not None and offsets[0] == offsets[1]


async def test_a_block_is_kept_until_its_commit_is_answered(pair: tuple[AsyncCache, CacheClient]) -> None:
    _, client = pair
    prompts = make_prompt(1, 1), make_prompt(1, 2)
    first = await client.store(prompts[0])
    second = await client.store(prompts[1])
    write(first[0], prompts[0])
    write(second[0], prompts[1])
    offset = first[0].offset
    first[0].commit()
    first.close()
    third = link_of(client).segment.blocks(4096, 1)  # type: ignore[union-attr]
    assert offset not in [offset for offset, _ in third]
    await first.settled()
    del third
    assert offset in [offset for offset, _ in link_of(client).segment.blocks(4096, 2)]  # type: ignore[union-attr]
    second.close()


async def test_a_link_that_is_not_open_loses_what_is_begun_on_it(pair: tuple[AsyncCache, CacheClient]) -> None:
    _, client = pair
    link = link_of(client)
    link.abort("for the test")
    for call in (lambda: link.ask(messages.Done, messages.Ping(1)), lambda: link.claims.claim("r")):
        with pytest.raises(ConnectionLostError, match="for the test"):
            async with asyncio.timeout(1):
                await call()
    assert link.calls == {}
