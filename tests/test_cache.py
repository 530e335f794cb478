"""`AsyncCache` at its ends: closed while it opens, while it is asked, while it is cleared."""

import asyncio
import gc
import logging
import os
import threading
import weakref
from array import array
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from async_cache import (
    AsyncCache,
    BackendError,
    CacheClosedError,
    CacheConfig,
    ConfigError,
    ConnectionLostError,
    LimitError,
    ModelLayout,
    ObjectGroup,
    ObjectKey,
    Prompt,
    ServerConfig,
    TenantConfig,
    connect,
)
from async_cache.l2.memory import MemoryBackend
from async_cache.memory import filled as filling
from async_cache.protocol.messages import MAX_CHUNKS
from async_cache.server import Server
from async_cache.testing import GatedBackend
from async_cache.write import backends as backends_module

LAYOUT = ModelLayout("m", (ObjectGroup((8,), "uint8"),), chunk_tokens=4)
PROMPT = LAYOUT.prompt(range(9))


async def until(cache: AsyncCache, *gone: str) -> None:
    """Return when these counters of the cache are 0."""
    async with asyncio.timeout(60):
        while any([getattr(await cache.stats(), name) for name in gone]):  # noqa: ASYNC110 (it is asked each turn)
            await asyncio.sleep(0)


async def test_it_is_told_how_far_the_filling_of_the_arena_is(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "_POPULATE_BYTES", 2**20)
    monkeypatch.setattr(filling, "_PROGRESS_SECONDS", 0)
    caplog.set_level(logging.INFO, "async_cache.memory.filled")
    async with AsyncCache(CacheConfig(l1_bytes=3 * 2**20, l2=[])):
        pass
    assert [record.getMessage() for record in caplog.records] == [
        f"L1: {n} of 3 MiB of memory are there" for n in (1, 2, 3)
    ]


async def test_memory_that_others_take_while_it_is_filled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    left = []

    def check(size_bytes: int) -> None:
        left.append(size_bytes)
        if size_bytes < 3 * 2**20:
            raise ConfigError("l1_bytes: gone")

    monkeypatch.setattr(filling, "_POPULATE_BYTES", 2**20)
    monkeypatch.setattr(filling, "check_free", check)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ConfigError, match="gone"):
        await AsyncCache(CacheConfig(l1_bytes=3 * 2**20, l2=[])).open()
    assert left == [3 * 2**20, 2 * 2**20]
    assert os.listdir("/proc/self/fd") == before


class NeverOpen(MemoryBackend):
    """Is opened until that is given up."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.ended = asyncio.Event(), asyncio.Event()

    async def open(self) -> None:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.set()


async def test_a_cache_that_is_closed_while_it_opens_does_not_open() -> None:
    backend = NeverOpen()
    cache = AsyncCache(CacheConfig(l1_bytes=2**20), [backend])
    opening = asyncio.create_task(cache.open())
    await backend.begun.wait()
    await cache.close()
    assert backend.ended.is_set(), "nothing of it goes on"
    with pytest.raises(CacheClosedError, match="was closed"):
        await opening
    with pytest.raises(CacheClosedError):
        await cache.stats()
    assert repr(cache).startswith("<AsyncCache, closed")


async def test_who_opens_a_cache_and_is_cancelled_gets_that_though_it_is_closed_as_well() -> None:
    backend = NeverOpen()
    cache = AsyncCache(CacheConfig(l1_bytes=2**20), [backend])
    opening = asyncio.create_task(cache.open())
    await backend.begun.wait()
    closing = asyncio.create_task(cache.close())
    await asyncio.sleep(0)
    opening.cancel()
    await closing
    with pytest.raises(asyncio.CancelledError):
        await opening


async def test_who_is_cancelled_in_the_step_in_which_it_has_opened_leaves_nothing_open() -> None:
    closed = asyncio.Event()

    class Told(MemoryBackend):
        async def close(self) -> None:
            closed.set()

    cache = AsyncCache(CacheConfig(l1_bytes=2**20), [Told()])
    opening = asyncio.create_task(cache.open())
    while cache._life.opening is None or not cache._life.opening.done():  # noqa: ASYNC110 (steps are counted)
        await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert closed.is_set(), "nobody else can close it"


async def test_who_is_cancelled_again_while_a_cache_that_was_opening_closes_leaves_no_memory() -> None:
    asked, leaves, may_leave = asyncio.Event(), asyncio.Event(), asyncio.Event()

    class Slow(MemoryBackend):
        async def notes(self) -> dict[str, bytes]:
            asked.set()
            await asyncio.Event().wait()
            raise AssertionError

        async def close(self) -> None:
            leaves.set()
            await may_leave.wait()

    before = os.listdir("/proc/self/fd")
    opening = asyncio.create_task(AsyncCache(CacheConfig(l1_bytes=2**20), [Slow()]).open())
    await asked.wait()
    opening.cancel()
    await leaves.wait()
    opening.cancel()
    await asyncio.sleep(0)
    may_leave.set()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert os.listdir("/proc/self/fd") == before


async def test_a_cache_that_is_closed_in_the_step_in_which_it_has_opened_is_closed() -> None:
    cache = AsyncCache(CacheConfig(l1_bytes=2**20, l2=["memory://"]))
    opening = asyncio.create_task(cache.open())
    while cache._life.opening is None or not cache._life.opening.done():  # noqa: ASYNC110 (steps are counted)
        await asyncio.sleep(0)
    assert repr(cache).startswith("<AsyncCache, opening")
    await cache.close()
    with pytest.raises(CacheClosedError):
        await opening


@pytest.mark.parametrize("error", [ValueError("odd"), OSError(28, "full"), asyncio.CancelledError()], ids=repr)
async def test_whatever_a_backend_raises_while_it_is_opened_is_a_backend_error(error: BaseException) -> None:
    class Raising(MemoryBackend):
        async def open(self) -> None:
            raise error

    with pytest.raises(BackendError, match=r"^memory "):
        await AsyncCache(CacheConfig(l1_bytes=2**20), [Raising()]).open()


async def test_a_lookup_that_the_cache_closes_upon_says_so() -> None:
    backend = GatedBackend(MemoryBackend(), "lookup")
    cache = await AsyncCache(CacheConfig(l1_bytes=2**20, close_timeout_seconds=0.1), [backend]).open()
    lookup = asyncio.create_task(cache.lookup(PROMPT))
    await asyncio.sleep(0)
    await cache.close()
    with pytest.raises(CacheClosedError):
        await lookup


async def test_a_clear_is_carried_to_its_end_where_its_caller_is_cancelled() -> None:
    prompt = LAYOUT.prompt(range(4 * 1000))
    async with AsyncCache(CacheConfig(l1_bytes=8 * 2**20, l2=["memory://"])) as cache:
        async with cache.store(prompt) as writer:
            for chunk in writer:
                chunk.commit()
        await cache.flush()
        clearing = asyncio.create_task(cache.clear("l1"))
        await asyncio.sleep(0)
        clearing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await clearing
        await until(cache, "l1_chunks")


async def test_a_cache_that_is_closed_before_its_server_breaks_the_futures_of_clients(tmp_path: Path) -> None:
    backend = GatedBackend(MemoryBackend(), "lookup")
    url = f"unix://{tmp_path}/s"
    cache = await AsyncCache(CacheConfig(l1_bytes=2**20, close_timeout_seconds=0.1), [backend]).open()
    async with Server(cache, ServerConfig(listen=[url])), connect(url) as client:
        prefetch = client.prefetch(PROMPT)
        await client.ping()
        await cache.close()
        for future in (prefetch.lookup_done, prefetch.load_done):
            with pytest.raises((CacheClosedError, ConnectionLostError)):
                await asyncio.wait_for(future, 60)


async def test_a_cancelled_close_of_a_client_leaves_no_connection(tmp_path: Path) -> None:
    url = f"unix://{tmp_path}/s"
    async with AsyncCache(CacheConfig(l1_bytes=2**20, l2=[])) as cache, Server(cache, ServerConfig(listen=[url])):
        for steps in range(4):
            client = await connect(url).open()
            async with client.store(PROMPT) as writer:
                for chunk in writer:
                    chunk.commit()
            prefetch = client.prefetch(PROMPT)
            await prefetch.load_done
            await client.read(prefetch.request_id)
            closing = asyncio.create_task(client.close())
            for _ in range(steps):
                await asyncio.sleep(0)
            closing.cancel()
            await asyncio.wait([closing])
            await client.close()
            await until(cache, "requests", "leases")


async def test_a_late_release_is_of_its_own_request(tmp_path: Path) -> None:
    url = f"unix://{tmp_path}/s"
    other = LAYOUT.prompt(range(100, 109))
    async with (
        AsyncCache(CacheConfig(l1_bytes=2**20, l2=[])) as cache,
        Server(cache, ServerConfig(listen=[url])),
        connect(url) as client,
    ):
        async with client.store(PROMPT) as writer:
            for chunk in writer:
                chunk.commit()
        await client.prefetch(PROMPT, request_id="a").load_done
        lease = await client.read("a")
        await client.end_request("a")
        again = client.prefetch(PROMPT, request_id="a")
        await again.load_done
        lease.release()
        assert client.prefetch(PROMPT, request_id="a") is again
        with pytest.raises(Exception, match="in use for another prompt"):
            client.prefetch(other, request_id="a")


async def test_a_result_that_is_given_back_late_is_not_that_of_another_request(tmp_path: Path) -> None:
    url = f"unix://{tmp_path}/s"
    async with (
        AsyncCache(CacheConfig(l1_bytes=2**20, l2=[])) as cache,
        Server(cache, ServerConfig(listen=[url])),
        connect(url) as one,
        connect(url) as two,
    ):
        async with one.store(PROMPT) as writer:
            for chunk in writer:
                chunk.commit()
        await one.prefetch(PROMPT, request_id="a").load_done
        result = await two.query_status("a")
        await one.end_request("a")
        await one.prefetch(PROMPT, request_id="a").load_done
        await one.query_status("a")
        two.unclaim(result)
        await two.ping()
        with pytest.raises(Exception, match="claimed"):
            await two.query_status("a")


async def filled(cache: AsyncCache) -> None:
    async with cache.store(PROMPT) as writer:
        for chunk in writer:
            chunk.commit()


async def test_a_claim_on_a_connection_that_is_closing_hears_of_its_end(tmp_path: Path) -> None:
    url = f"unix://{tmp_path}/s"
    async with (
        AsyncCache(CacheConfig(l1_bytes=2**20, l2=[])) as cache,
        Server(cache, ServerConfig(listen=[url])),
        connect(url) as client,
    ):
        link = client._links.connected()
        link.connection.abort()
        claims = [asyncio.create_task(link.claims.claim("x")) for _ in range(2)]
        for claim in claims:
            with pytest.raises(ConnectionLostError):
                await asyncio.wait_for(claim, 60)


@pytest.mark.parametrize("chunks", [0, 2])
async def test_a_claim_that_is_given_up_at_any_moment_loses_no_result(tmp_path: Path, chunks: int) -> None:
    url = f"unix://{tmp_path}/s"
    async with (
        AsyncCache(CacheConfig(l1_bytes=2**20, l2=[])) as cache,
        Server(cache, ServerConfig(listen=[url])),
        connect(url) as client,
    ):
        if chunks:
            await filled(cache)
        for steps in range(60):
            prefetch = client.prefetch(PROMPT)
            given_up = asyncio.create_task(client.query_status(prefetch.request_id))
            for _ in range(steps // 2):
                await asyncio.sleep(0)
            given_up.cancel()
            if steps % 2:
                await asyncio.wait([given_up])
            asked = await asyncio.wait_for(
                asyncio.gather(given_up, client.query_status(prefetch.request_id), return_exceptions=True), 5
            )
            results = [result for result in asked if not isinstance(result, BaseException)]
            assert [result.chunks for result in results] == [chunks], (steps, asked)
            await client.end_request(prefetch.request_id)


async def test_at_the_limit_an_id_that_was_ended_makes_room_at_once(tmp_path: Path) -> None:
    url = f"unix://{tmp_path}/s"
    async with (
        AsyncCache(CacheConfig(l1_bytes=2**20, l2=[])) as cache,
        Server(cache, ServerConfig(listen=[url], max_requests=1)),
        connect(url) as client,
    ):
        await client.prefetch(PROMPT, request_id="a").load_done
        for _ in range(20):
            ending = asyncio.create_task(client.end_request("a"))
            await asyncio.sleep(0)
            prefetch = client.prefetch(PROMPT, request_id="a")
            await prefetch.load_done
            await ending


async def test_two_servers_of_a_cache_hold_a_request_together(tmp_path: Path) -> None:
    urls = [f"unix://{tmp_path}/{n}" for n in (1, 2)]
    async with (
        AsyncCache(CacheConfig(l1_bytes=2**20, l2=[])) as cache,
        Server(cache, ServerConfig(listen=[urls[0]])),
        Server(cache, ServerConfig(listen=[urls[1]])) as second,
        connect(urls[1]) as two,
    ):
        await filled(cache)
        async with connect(urls[0]) as one:
            await one.prefetch(PROMPT, request_id="a").load_done
            await two.prefetch(PROMPT, request_id="a").load_done
        await two.ping()
        async with asyncio.timeout(60):
            assert (await two.query_status("a")).chunks == 2
        await two.end_request("a")
        await two.ping()
        assert [session.held for session in second._sessions] == [{}]


async def test_a_read_of_before_the_close_that_is_entered_after_it_says_so() -> None:
    async with AsyncCache(CacheConfig(l1_bytes=2**20, l2=[])) as cache:
        await filled(cache)
        prefetch = cache.prefetch(PROMPT)
        lease = cache.read(prefetch.request_id)
    with pytest.raises(CacheClosedError):
        await lease


async def test_a_backend_that_is_added_as_the_cache_closes_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    imported, opened = threading.Event(), []

    class Late(MemoryBackend):
        async def open(self) -> None:
            opened.append(self)

    def from_url(url: str) -> Late:
        assert imported.wait(60)
        return Late("late")

    monkeypatch.setattr(backends_module, "from_url", from_url)
    async with AsyncCache(CacheConfig(l1_bytes=2**20, l2=[])) as cache:
        adding = asyncio.create_task(cache.add_backend("late://"))
        await asyncio.sleep(0)
    imported.set()
    with pytest.raises(CacheClosedError):
        await adding
    assert opened == []


async def test_a_lookup_that_hashes_while_a_backend_is_removed_does_not_ask_it(monkeypatch: pytest.MonkeyPatch) -> None:
    removed, asked = threading.Event(), []
    hash_prompt = Prompt.hash

    def hash_late(prompt: Prompt) -> None:
        assert removed.wait(60)
        hash_prompt(prompt)

    class Near(MemoryBackend):
        shared = True

        async def lookup(self, keys: Sequence[ObjectKey]) -> list[bool]:
            asked.append(keys)
            return await super().lookup(keys)

    monkeypatch.setattr(Prompt, "hash", hash_late)
    async with AsyncCache(CacheConfig(l1_bytes=2**20), [Near("near")]) as cache:
        looking = asyncio.create_task(cache.lookup(LAYOUT.prompt(range(40_000))))
        await asyncio.sleep(0)
        await cache.remove_backend("near")
        removed.set()
        assert (await looking).chunks == 0
    assert asked == []


async def test_a_call_from_another_loop_is_told_so_at_once() -> None:
    async with AsyncCache(CacheConfig(l1_bytes=2**20, l2=[])) as cache:

        async def elsewhere() -> None:
            with pytest.raises(RuntimeError, match="another event loop"):
                cache.prefetch(PROMPT)
            for call in (lambda: cache.lookup(PROMPT), cache.close):
                with pytest.raises(RuntimeError, match="another event loop"):
                    await call()

        await asyncio.to_thread(asyncio.run, elsewhere())
        with pytest.raises(RuntimeError, match="another event loop"):
            await asyncio.to_thread(cache.prefetch, PROMPT)  # also where no loop runs
        assert (await cache.lookup(PROMPT)).chunks == 0


async def test_a_closed_cache_keeps_nothing_of_what_it_was() -> None:
    cache = await AsyncCache(CacheConfig(l1_bytes=2**20, l2=["memory://"])).open()
    arena = weakref.ref(cache.core.arena)
    await cache.close()
    async with asyncio.timeout(60):  # a thread that has worked for it may be about to let it go
        while arena() is not None:  # not its memory either, however long somebody has it
            gc.collect()
            await asyncio.sleep(0.001)


async def test_a_cache_whose_loop_was_closed_says_so() -> None:
    cache = AsyncCache(CacheConfig(l1_bytes=2**20, l2=[]))
    await asyncio.to_thread(asyncio.run, cache.open())
    with pytest.raises(RuntimeError, match="was closed meanwhile"):
        await cache.close()


async def test_a_call_of_a_client_from_another_loop_is_told_so_at_once(tmp_path: Path) -> None:
    url = f"unix://{tmp_path}/s"
    async with (
        AsyncCache(CacheConfig(l1_bytes=2**20, l2=[])) as cache,
        Server(cache, ServerConfig(listen=[url])),
        connect(url) as client,
    ):

        async def elsewhere() -> None:
            for call in (
                client.ping,
                client.stats,
                lambda: client.lookup(PROMPT),
                lambda: client.query_status("x"),
                client.close,
            ):
                with pytest.raises(RuntimeError, match="another event loop"):
                    await asyncio.wait_for(call(), 60)
            with pytest.raises(RuntimeError, match="another event loop"):
                client.prefetch(PROMPT)

        await asyncio.to_thread(asyncio.run, elsewhere())
        await client.ping()


async def test_a_prompt_longer_than_l1_is_stored_piece_by_piece() -> None:
    layout = ModelLayout("m", (ObjectGroup((4096,), "uint8"),), chunk_tokens=4)
    prompt = layout.prompt(range(4 * 60))
    async with AsyncCache(CacheConfig(l1_bytes=24 * 4096, l2=["memory://"])) as cache:
        stored = 0
        while stored < 60:
            async with cache.store(prompt, start_chunk=stored) as writer:
                assert len(writer), f"no room behind {stored} chunks that are written back"
                for chunk in writer:
                    chunk.views[0][:] = bytes([chunk.index]) * 4096  # type: ignore[index]
                    chunk.commit()
                stored += len(writer)
            assert (await cache.flush()).dropped == 0
        assert (await cache.lookup(prompt)).chunks == 60


async def test_without_storage_the_tail_of_a_prompt_takes_no_room_from_its_own_head() -> None:
    layout = ModelLayout("m", (ObjectGroup((4096,), "uint8"),), chunk_tokens=4)
    prompt = layout.prompt(range(4 * 60))
    async with AsyncCache(CacheConfig(l1_bytes=24 * 4096, l2=[])) as cache:
        for start in (0, 24):
            async with cache.store(prompt, start_chunk=start) as writer:
                for chunk in writer:
                    chunk.commit()
        assert (await cache.lookup(prompt)).chunks == 24


async def test_five_million_tokens_are_hashed_here_or_refused_with_the_limit(tmp_path: Path) -> None:
    url = f"unix://{tmp_path}/s"
    layout = ModelLayout("m", (ObjectGroup((8,), "uint8"),), chunk_tokens=256)
    tokens = array("i", range(5_000_000))
    secret = "0123456789abcdef"
    config = ServerConfig(listen=[url], tenants={"t": TenantConfig(tokens=(secret,), salts=("s",))})
    async with AsyncCache(CacheConfig(l1_bytes=2**20, l2=[])) as cache, Server(cache, config):
        async with connect(url) as client:
            assert (await client.prefetch(layout.prompt(tokens)).load_done).chunks == 0
        async with connect(url, token=secret) as bound:
            with pytest.raises(LimitError, match="4000000 tokens"):
                await bound.lookup(layout.prompt(tokens, salt="s"))


@pytest.mark.parametrize("who", ["trusted", "bound"])
async def test_as_many_chunks_as_the_protocol_allows_go_over_the_wire_and_not_one_more(
    tmp_path: Path, who: str
) -> None:
    url, secret, salt = f"unix://{tmp_path}/s", "0123456789abcdef", "s" if who == "bound" else ""
    tenant = TenantConfig(tokens=(secret,), salts=("s",) if who == "bound" else None)
    config = ServerConfig(listen=[url], tenants={"t": tenant})
    prompt = LAYOUT.prompt(array("i", range(4 * MAX_CHUNKS)), salt=salt)
    longer = LAYOUT.prompt(array("i", range(4 * MAX_CHUNKS + 4)), salt=salt)
    async with (
        AsyncCache(CacheConfig(l1_bytes=2**20, l2=[])) as cache,
        Server(cache, config),
        connect(url, token=secret) as client,
    ):
        async with client.store(LAYOUT.prompt(range(8), salt=salt)) as writer:
            for chunk in writer:
                chunk.commit()
        assert (await client.lookup(prompt)).chunks == 2
        assert (await client.prefetch(prompt).load_done).chunks == 2
        with pytest.raises(LimitError, match=f"at most {MAX_CHUNKS} chunks, not {MAX_CHUNKS + 1}"):
            await client.lookup(longer)
        with pytest.raises(LimitError, match=f"at most {MAX_CHUNKS} chunks, not {MAX_CHUNKS + 1}"):
            client.prefetch(longer)


class Listing(MemoryBackend):
    """Holds thousands of objects, and notes how far its listing was ahead of the deletions."""

    ahead = most_ahead = 0

    async def keys(self) -> AsyncIterator[tuple[ObjectKey, int]]:
        async for item in super().keys():
            self.ahead += 1
            self.most_ahead = max(self.most_ahead, self.ahead)
            yield item

    async def delete(self, keys: Sequence[ObjectKey]) -> int:
        self.ahead -= len(keys)
        return await super().delete(keys)


async def test_to_clear_storage_lists_no_more_than_it_deletes_next() -> None:
    backend = Listing()
    async with AsyncCache(CacheConfig(l1_bytes=16 * 2**20), [backend]) as cache:
        async with cache.store(LAYOUT.prompt(range(4 * 3000))) as writer:
            for chunk in writer:
                chunk.commit()
        await cache.flush()
        assert (await cache.clear("all")).chunks == 3000
        assert backend.usage().objects == 0
        assert backend.most_ahead <= 256


class Circling(MemoryBackend):
    """Lists so many objects again and again."""

    length = 1

    async def keys(self) -> AsyncIterator[tuple[ObjectKey, int]]:
        while True:
            for number in range(self.length):
                yield ObjectKey(number.to_bytes(32, "little"), 0, 0), 8
            await asyncio.sleep(0)


@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 1000, 5000])
async def test_to_clear_storage_whose_listing_goes_in_a_circle_ends(length: int) -> None:
    backend = Circling()
    backend.length = length
    async with AsyncCache(CacheConfig(l1_bytes=2**20), [backend]) as cache:
        with pytest.raises(BackendError, match="lists the same objects again and again"):
            await asyncio.wait_for(cache.clear("all"), 60)
        assert (await cache.lookup(PROMPT)).chunks == 0
