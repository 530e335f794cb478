"""A server that is killed: whoever waits hears of it at once, and goes on with the next server at the address."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for

import pytest
from contract.support import PAGE, count_hits, fill, make_prompt, open_cache, pattern, read_back, verify

from async_cache import BlockingClient, ConnectionLostError, WriterClosedError, connect
from async_cache.l2.filesystem.backend import FileSystemBackend

from .programs import server
from .support import reconnected

PROMPT = make_prompt(8)
OTHER = make_prompt(8, 2)
AT_ONCE_SECONDS = 60  # of a client without heartbeats, and a server without timeouts: nothing else would end it

# What is waited for when a backend waits for ever in its lookup, and in its load.
LOOKUP_WAITS = {
    "lookup_done": lambda cache, prefetch: prefetch.lookup_done,
    "load_done": lambda cache, prefetch: prefetch.load_done,
    "query_lookup_hits": lambda cache, prefetch: cache.query_lookup_hits(prefetch.request_id),
    "query_status": lambda cache, prefetch: cache.query_status(prefetch.request_id),
    "read": lambda cache, prefetch: attempt_read(cache, prefetch),
    "lookup": lambda cache, prefetch: cache.lookup(OTHER),
}
LOAD_WAITS = {name: LOOKUP_WAITS[name] for name in ("load_done", "query_status", "read")}
WAITS = {"lookup": LOOKUP_WAITS, "load": LOAD_WAITS}


async def attempt_read(cache, prefetch):
    return await cache.read(prefetch.request_id)


async def seed(directory):
    async with open_cache(FileSystemBackend(directory), pages=64) as cache:
        await fill(cache, PROMPT)
        assert (await cache.flush()).dropped == 0


def odd_server(tmp_path, verb):
    """Its backend waits for ever in its lookups, or its loads."""
    return server(
        tmp_path,
        l2=[f"fs://{tmp_path}/l2"],
        via=["server.odd", verb],
        lookup_timeout_seconds=600,
        load_timeout_seconds=600,
    )


def next_server(tmp_path):
    return server(tmp_path, l2=[f"fs://{tmp_path}/l2"])


@pytest.mark.parametrize("verb", WAITS)
async def test_a_client_hears_at_once_and_finds_what_is_in_storage(tmp_path, verb):
    await seed(tmp_path / "l2")
    async with connect_to(tmp_path, verb) as (served, cache):
        prefetch = cache.prefetch(PROMPT)
        waits = {name: asyncio.ensure_future(wait(cache, prefetch)) for name, wait in WAITS[verb].items()}
        if verb == "load":
            assert (await prefetch.lookup_done).l2_chunks == len(PROMPT)
        await asyncio.sleep(0)
        await cache.ping()  # and so the server has got all of them
        served.kill()
        _, pending = await asyncio.wait(waits.values(), timeout=AT_ONCE_SECONDS)
        assert not pending
        assert {name: type(wait.exception()) for name, wait in waits.items()} == dict.fromkeys(
            waits, ConnectionLostError
        )
        with pytest.raises(ConnectionLostError):
            await cache.prefetch(PROMPT).load_done
        with next_server(tmp_path):
            await reconnected(cache)
            assert await count_hits(cache, PROMPT) == len(PROMPT)
            result = await cache.prefetch(PROMPT, request_id="again").load_done
            assert (result.chunks, result.l2_chunks) == (len(PROMPT), len(PROMPT))
            async with cache.read("again") as lease:
                assert len(verify(lease, PROMPT)) == len(PROMPT)
            await fill(cache, OTHER)
            assert await read_back(cache, OTHER) == len(OTHER)


class connect_to:  # noqa: N801
    """An odd server and its client; the server may be killed."""

    def __init__(self, tmp_path, verb):
        self._server = odd_server(tmp_path, verb)

    async def __aenter__(self):
        served = self._server.__enter__()
        self._client = connect(served.url, heartbeat_seconds=None)
        return served, await self._client.open()

    async def __aexit__(self, *error):
        await self._client.close()
        self._server.__exit__(*error)


@pytest.mark.parametrize("verb", WAITS)
def test_a_blocking_client_hears_at_once_and_finds_what_is_in_storage(tmp_path, verb):
    asyncio.run(seed(tmp_path / "l2"))
    with (
        odd_server(tmp_path, verb) as served,
        BlockingClient(served.url, heartbeat_seconds=None) as cache,
        ThreadPoolExecutor(len(LOOKUP_WAITS)) as threads,
    ):
        prefetch = cache.prefetch(PROMPT)
        calls = {
            "query_lookup_hits": lambda: cache.query_lookup_hits(prefetch.request_id),
            "query_status": lambda: cache.query_status(prefetch.request_id),
            "read": lambda: cache.read(prefetch.request_id),
            "lookup": lambda: cache.lookup(OTHER),
        }
        names = [name for name in calls if name in WAITS[verb]]
        under_way = threading.Barrier(len(names) + 1)

        def call(name):
            under_way.wait()
            return calls[name]()

        waits = {name: threads.submit(call, name) for name in names}
        waits["load_done"] = prefetch.load_done
        if verb == "lookup":
            waits["lookup_done"] = prefetch.lookup_done
        else:
            assert prefetch.lookup_done.result().l2_chunks == len(PROMPT)
        under_way.wait()
        for _ in range(50):  # each lets the other threads have their turn
            cache.ping()
        assert not any(wait.done() for wait in waits.values())
        served.kill()
        assert not wait_for(waits.values(), timeout=AT_ONCE_SECONDS).not_done
        assert {name: type(wait.exception()) for name, wait in waits.items()} == dict.fromkeys(
            waits, ConnectionLostError
        )
        with next_server(tmp_path):
            asyncio.run(reconnected(_Asynchronous(cache)))
            assert cache.lookup(PROMPT).chunks == len(PROMPT)
            again = cache.prefetch(PROMPT)
            assert again.load_done.result().l2_chunks == len(PROMPT)
            with cache.read(again.request_id) as lease:
                assert len(verify(lease, PROMPT)) == len(PROMPT)


class _Asynchronous:
    """The one call of `reconnected`."""

    def __init__(self, cache):
        self._cache = cache

    async def ping(self):
        return self._cache.ping()


async def test_what_was_read_stays_and_what_was_written_is_refused(tmp_path):
    with server(tmp_path) as served:
        async with connect(served.url) as cache:
            await fill(cache, PROMPT)
            lease = await cache.read((await cache.prefetch(PROMPT).load_done).request_id)
            writer = await cache.store(OTHER)
            memory = cache.memory
            served.kill()
            with pytest.raises(ConnectionLostError):
                await cache.query_status("that waits for the news")
            assert len(verify(lease, PROMPT)) == len(PROMPT)
            offset = lease[0].offset
            assert memory[offset : offset + 16] == pattern(PROMPT, 0)
            with pytest.raises(WriterClosedError):
                writer[0].commit()
            writer.close()
            lease.release()
            with pytest.raises(ConnectionLostError):
                await cache.store(OTHER)
            with server(tmp_path, l1=str(128 * PAGE)):  # of another size: the client maps it anew
                await reconnected(cache)
                assert len(cache.memory) == 128 * PAGE
                assert await count_hits(cache, PROMPT) == 0
                await fill(cache, PROMPT)
                assert await read_back(cache, PROMPT) == len(PROMPT)


async def test_a_write_that_was_under_way_does_not_hold_up_its_writer(tmp_path, monkeypatch):
    """A store that waits for the connection fails as the others do, and the client closes in no time."""
    with server(tmp_path) as served:
        cache = await connect(served.url).open()
        served.kill()
        with pytest.raises(ConnectionLostError):
            await fill(cache, PROMPT)
        monkeypatch.setattr("async_cache.client.links._CLOSE_SECONDS", 3600)
        async with asyncio.timeout(AT_ONCE_SECONDS):
            await cache.close()
