"""A server that fails: an object that cannot be read is its own matter, and each call ends, with what it brought."""

import asyncio
import itertools
import logging
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import obstore
import pytest
from obstore.store import MemoryStore

from async_cache.errors import BackendError, ConfigError
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.object_store.backend import ObjectStoreBackend
from async_cache.testing.conformance import content, find, get, key, put, views

from .support import BUCKET, CREDENTIALS, Server
from .test_conformance import name

MIB = 2**20
LOADED, GONE, CORRUPT, FAILED = LoadOutcome
numbers = itertools.count()

DENIED = {"status": 403, "code": "AccessDenied"}
SLOW_DOWN = {"status": 503, "code": "SlowDown"}
FAULTS = [
    DENIED,
    {"status": 401, "code": "Unauthorized"},
    {"status": 400, "code": "ExpiredToken"},
    SLOW_DOWN,
    {"status": 500, "code": "InternalError"},
    {"cut": 1000},
    {"reset": "before"},
    {"reset": "after"},
    {"delay": 20},  # longer than a load may take
]
STATUSES = [fault for fault in FAULTS if "status" in fault]


def patience(fault: dict[str, Any]) -> dict[str, Any]:
    """Short, where what its test waits for is the end of it."""
    return {"lookup_timeout": 5, "load_timeout": 5} if "delay" in fault else {}


@asynccontextmanager
async def opened(server: Server, **parameters: Any) -> AsyncIterator[ObjectStoreBackend]:
    """An empty backend on the server, as patient as a busy machine asks for."""
    parameters = {"lookup_timeout": 60, "load_timeout": 60, "store_timeout": 60} | parameters
    backend = server.backend(f"faults-{next(numbers)}", **parameters)
    await backend.open()
    try:
        yield backend
    finally:
        server.faults()
        await backend.close()


def path(backend: ObjectStoreBackend, n: int) -> str:
    return f"/{BUCKET}/{backend._folder}{name(key(n))}"


def of(verb: str, backend: ObjectStoreBackend, n: int) -> dict[str, Any]:
    """The requests with a verb for an object, whatever their query is."""
    return {"request": rf"{verb} {re.escape(path(backend, n))}(\?.*)?"}


def secret(text: str) -> bool:
    return any(value in text for value in CREDENTIALS.values())


async def seen(server: Server, what: str) -> None:
    """Wait until the server has a request with this in it."""
    while not any(what in request for request in server.seen()):  # noqa: ASYNC110 (another process is waited for)
        await asyncio.sleep(0.01)


# Loads.


@pytest.mark.parametrize("fault", FAULTS, ids=str)
async def test_an_object_that_can_not_be_read_fails_alone_and_is_stored_anew(
    server: Server, fault: dict[str, Any]
) -> None:
    async with opened(server, **patience(fault)) as backend:
        await put(backend, range(3), 5000)
        server.faults(of("GET", backend, 1) | fault)
        assert await get(backend, range(3), 5000) == [content(0, 5000), FAILED, content(2, 5000)]
        server.faults()
        assert await put(backend, range(3), 5000) == [True] * 3
        assert [request for request in server.seen() if request.startswith("PUT")] == [f"PUT {path(backend, 1)}"]
        assert await get(backend, range(3), 5000) == [content(n, 5000) for n in range(3)]


async def test_what_is_denied_while_others_are_not_is_not_found_until_it_is_stored_anew(server: Server) -> None:
    async with opened(server) as backend:
        await put(backend, range(3), 5000)
        server.faults(of("GET", backend, 1) | {"status": 403, "code": "InvalidObjectState"})
        assert await get(backend, [0, 1], 5000) == [content(0, 5000), FAILED]
        assert await find(backend, range(3)) == [True, False, True]
        server.faults(of("GET", backend, 2) | SLOW_DOWN)  # which will pass
        assert await get(backend, [0, 2], 5000) == [content(0, 5000), FAILED]
        assert await find(backend, range(3)) == [True, False, True]
        assert await put(backend, [1], 5000) == [True]
        assert await find(backend, range(3)) == [True, True, True]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
async def test_a_load_that_brings_nothing_raises_and_tells_no_secret(server: Server, fault: dict[str, Any]) -> None:
    async with opened(server, **patience(fault)) as backend:
        await put(backend, range(3), 5000)
        server.faults({"request": "GET .*"} | fault)
        with pytest.raises(BackendError, match=re.escape(backend.name)) as caught:
            await get(backend, range(3), 5000)
        assert not secret(repr(caught.value)) and caught.value.__cause__ is None
        assert "\n" not in str(caught.value) and str(fault.get("status", "")) in str(caught.value)


@pytest.mark.parametrize("fault", [{"cut": 1000}, SLOW_DOWN, {"status": 500}], ids=str)
async def test_a_fault_of_the_moment_is_overcome(server: Server, fault: dict[str, Any]) -> None:
    async with opened(server) as backend:
        await put(backend, [1], 100_000)
        server.faults(of("GET", backend, 1) | fault | {"times": 1})
        assert await get(backend, [1], 100_000) == [content(1, 100_000)]


async def test_a_body_that_is_spoiled_on_its_way_is_read_again(server: Server) -> None:
    async with opened(server) as backend:
        await put(backend, [1], 5000)
        server.faults(of("GET", backend, 1) | {"trim": 4000, "times": 1})
        assert await get(backend, [1], 5000) == [content(1, 5000)]


@pytest.mark.parametrize("size_bytes", [0, 1, 63, 64, 65, 4999, 5000, 5063, 5065, 6000, 20 * MIB])
async def test_what_is_shorter_or_longer_than_its_object_is_corrupt_and_removed(
    server: Server, size_bytes: int
) -> None:
    async with opened(server, part="5MiB") as backend:
        await put(backend, [1, 2], 5000)
        bucket = backend._connect(10)
        record = bytes((await obstore.get_async(bucket, path(backend, 1).split("/", 2)[2])).bytes())
        assert len(record) == 5064
        obstore.put(bucket, path(backend, 1).split("/", 2)[2], (record + bytes(20 * MIB))[:size_bytes])
        assert await get(backend, [1, 2], 5000) == [CORRUPT, content(2, 5000)]
        assert await get(backend, [1], 5000) == [GONE]
        assert await put(backend, [1], 5000) == [True]
        assert await get(backend, [1], 5000) == [content(1, 5000)]


@pytest.mark.parametrize("size_bytes", [3 * MIB, 12 * MIB, 17 * MIB])
async def test_a_long_object_that_ends_before_a_range_of_it_is_corrupt(server: Server, size_bytes: int) -> None:
    async with opened(server, part="5MiB") as backend:
        await put(backend, [1], 18 * MIB)
        whole = content(1, 18 * MIB)
        obstore.put(backend._connect(10), path(backend, 1).split("/", 2)[2], whole[:size_bytes])
        assert await get(backend, [1], 18 * MIB) == [CORRUPT]
        assert await find(backend, [1]) == [False]


async def test_the_record_of_another_object_is_corrupt(server: Server) -> None:
    async with opened(server) as backend:
        await put(backend, [1, 2], 5000)
        bucket = backend._connect(10)
        source, target = (path(backend, n).split("/", 2)[2] for n in (2, 1))
        obstore.put(bucket, target, bytes(obstore.get(bucket, source).bytes()))
        assert await get(backend, [1, 2], 5000) == [CORRUPT, content(2, 5000)]
        assert await find(backend, [1, 2]) == [False, True]


async def test_what_is_corrupt_and_can_not_be_deleted_is_not_found_until_it_is_stored_anew(server: Server) -> None:
    async with opened(server) as backend:
        await put(backend, [1, 2], 5000)
        obstore.put(backend._connect(10), path(backend, 1).split("/", 2)[2], bytes(5064))
        server.faults({"request": "(POST|DELETE) .*"} | DENIED)
        assert await get(backend, [1, 2], 5000) == [CORRUPT, content(2, 5000)]
        assert await find(backend, [1, 2]) == [False, True]
        server.faults()
        assert await put(backend, [1, 2], 5000) == [True, True]
        assert await get(backend, [1, 2], 5000) == [content(1, 5000), content(2, 5000)]


async def test_a_deletion_that_comes_between_is_gone(server: Server) -> None:
    async with opened(server) as backend:
        await put(backend, [1, 2], 5000)
        assert await find(backend, [1, 2]) == [True, True]
        obstore.delete(backend._connect(10), path(backend, 1).split("/", 2)[2])  # by another host
        assert await get(backend, [1, 2], 5000) == [GONE, content(2, 5000)]
        assert await find(backend, [1, 2]) == [False, True]


@pytest.mark.parametrize("how", ["delete", "gone"])
async def test_an_answer_on_its_way_does_not_outlive_what_was_heard_meanwhile(server: Server, how: str) -> None:
    async with opened(server) as backend:
        await put(backend, [1], 5000)
        server.faults(of("HEAD", backend, 1) | {"late": 0.8, "times": 1})
        lookup = asyncio.ensure_future(find(backend, [1]))
        await seen(server, "HEAD")
        # The answer says that it is there, whatever becomes of it now.
        if how == "gone":
            obstore.delete(backend._connect(10), path(backend, 1).split("/", 2)[2])
            assert await get(backend, [1], 5000) == [GONE]
        else:
            assert await backend.delete([key(1)]) == 1
        assert not lookup.done(), "the machine was too slow for this test"
        assert await lookup == [False]


# Lookups.


@pytest.mark.parametrize("fault", [*STATUSES, {"reset": "before"}, {"delay": 20}], ids=str)
async def test_an_object_that_can_not_be_looked_up_is_a_miss_alone(server: Server, fault: dict[str, Any]) -> None:
    async with opened(server, **patience(fault)) as backend:
        await put(backend, range(3), 5000)
        server.faults(of("HEAD", backend, 1) | fault)
        assert await find(backend, range(3)) == [True, False, True]
        server.faults({"request": "HEAD .*"} | fault)
        with pytest.raises(BackendError, match=re.escape(backend.name)):
            await find(backend, range(3))


# Stores.


@pytest.mark.parametrize("size_bytes", [5000, 18 * MIB])
@pytest.mark.parametrize("fault", [*STATUSES, {"reset": "before"}], ids=str)
async def test_a_store_fails_for_its_object_alone_and_leaves_nothing_behind(
    server: Server, fault: dict[str, Any], size_bytes: int
) -> None:
    async with opened(server, part="5MiB") as backend:
        server.faults(of("PUT", backend, 1) | fault)
        assert await put(backend, range(3), size_bytes) == [True, False, True]
        server.faults({"request": "PUT .*"} | fault)
        with pytest.raises(BackendError, match=re.escape(backend.name)) as caught:
            await put(backend, [1], size_bytes)
        assert not secret(repr(caught.value))
        server.faults()
        assert await get(backend, range(3), size_bytes) == [content(0, size_bytes), GONE, content(2, size_bytes)]
        assert uploads(server) == []


async def test_a_store_that_is_cancelled_leaves_no_parts_behind_and_nothing_lands_later(server: Server) -> None:
    async with opened(server, part="5MiB") as backend:
        server.faults({"request": r"PUT .*partNumber=2.*", "delay": 0.5})
        blob = bytearray(content(1, 18 * MIB))
        store = asyncio.ensure_future(backend.store([key(1)], views([blob])))
        await seen(server, "partNumber=2")
        for _ in range(3):
            store.cancel()
            await asyncio.sleep(0.01)
        with pytest.raises(asyncio.CancelledError):
            await store
        blob[:] = bytes(len(blob))
        assert uploads(server) == []
        assert await get(backend, [1], 18 * MIB) == [content(1, 18 * MIB)]


async def test_a_deletion_comes_after_the_store_that_it_follows(server: Server) -> None:
    async with opened(server) as backend:
        server.faults(of("PUT", backend, 1) | {"delay": 0.3})
        store = asyncio.ensure_future(put(backend, [1], 5000))
        await seen(server, "PUT")
        assert await backend.delete([key(1)]) == 1
        assert await store == [True]
        assert await get(backend, [1], 5000) == [GONE]
        assert backend.usage().objects == 0


async def test_a_close_does_not_wait_for_a_server_that_is_silent(server: Server) -> None:
    async with opened(server, store_timeout=60, load_timeout=60) as backend:
        server.faults({"request": "PUT .*", "delay": 50})
        store = asyncio.ensure_future(put(backend, [1], 5000))
        await seen(server, "PUT")
        store.cancel()
        began = time.monotonic()
        await backend.close()
        with pytest.raises((asyncio.CancelledError, BackendError)):
            await store
        assert time.monotonic() - began < 25


async def test_when_a_close_returns_no_load_touches_its_buffers(server: Server) -> None:
    async with opened(server, store_timeout=60, load_timeout=60, concurrency=1) as backend:
        await put(backend, range(3), 5000)
        server.faults(of("GET", backend, 1) | {"delay": 3, "times": 1})
        buffers = [bytearray(5000) for _ in range(3)]
        load = asyncio.ensure_future(backend.load([key(n) for n in range(3)], views(buffers)))
        await seen(server, "GET")
        await backend.close()
        assert load.done()
        with pytest.raises((asyncio.CancelledError, BackendError)):
            await load


def uploads(server: Server) -> list[str]:
    """The uploads in parts that were begun and neither completed nor aborted."""
    return re.findall("<UploadId>.*?</UploadId>", server.request("GET", f"/{BUCKET}?uploads").decode())


# Deletions and listings.


async def test_a_deletion_of_many_is_few_requests(server: Server) -> None:
    async with opened(server) as backend:
        await put(backend, range(50), 10)
        server.faults()
        assert await backend.delete([key(n) for n in range(60)]) == 50
        changes = [request for request in server.seen() if not request.startswith("HEAD")]
        assert changes == [f"POST /{BUCKET}?delete"]


async def test_a_service_without_bulk_deletion_deletes_one_by_one(server: Server) -> None:
    async with opened(server, bulk_delete="false") as backend:
        await put(backend, range(5), 10)
        server.faults({"request": r"POST .*", "status": 501})
        assert await backend.delete([key(n) for n in range(6)]) == 5
        assert await find(backend, range(6)) == [False] * 6


@pytest.mark.parametrize("fault", [DENIED, SLOW_DOWN, {"reset": "before"}], ids=str)
async def test_a_deletion_that_fails_says_so(server: Server, fault: dict[str, Any]) -> None:
    async with opened(server) as backend:
        await put(backend, range(3), 10)
        server.faults({"request": "(POST|DELETE) .*"} | fault)
        with pytest.raises(BackendError, match="3 objects were not deleted"):
            await backend.delete([key(n) for n in range(3)])
        server.faults()
        assert await find(backend, range(3)) == [True] * 3
        assert backend.usage().objects == 3


async def test_a_listing_skips_what_is_not_ours_and_goes_over_pages(server: Server) -> None:
    async with opened(server) as backend:
        await put(backend, range(3), 10)
        bucket, folder = backend._connect(10), backend._folder
        ours = name(key(7))
        for foreign in (
            "readme.txt",
            ours.split("/")[1],  # beside its folder
            f"0000/{ours.split('/')[1]}",
            f"{ours}.tmp",
            f"deeper/{ours}",
            name(key(8)).upper(),
        ):
            obstore.put(bucket, folder + foreign, bytes(100))
        obstore.put(bucket, folder + name(key(9)), bytes(63))  # too short for a record
        obstore.put(bucket, "elsewhere/" + name(key(10)), bytes(100))
        listed = [item async for item in backend.keys()]
        assert sorted(listed) == sorted((key(n), 10) for n in range(3))
        assert backend.usage().objects == 3


async def test_a_listing_that_fails_says_so(server: Server) -> None:
    async with opened(server) as backend:
        server.faults({"request": "GET .*list-type.*"} | SLOW_DOWN)
        with pytest.raises(BackendError, match=f"{re.escape(backend.name)}.*503.*SlowDown"):
            _ = [item async for item in backend.keys()]


async def test_a_call_about_very_many_objects_neither_holds_the_loop_nor_those_of_others() -> None:
    backend = ObjectStoreBackend("memory store", lambda _: MemoryStore())
    await backend.open()
    try:
        most, many = 0, asyncio.ensure_future(backend.lookup([key(n) for n in range(20_000)]))
        await asyncio.sleep(0)
        few = asyncio.ensure_future(find(backend, [1]))
        while not many.done():
            most = max(most, len(asyncio.all_tasks()))
            await asyncio.sleep(0)
            assert few.done() or not many.done()
        assert most < 1000
        assert few.done() and await many == [False] * 20_000
    finally:
        await backend.close()


async def test_a_load_that_outlasts_the_close_is_a_fault_and_no_cancel(server: Server) -> None:
    async with opened(server, load_timeout=20) as backend:
        await put(backend, [1], 5000)
        server.faults({**of("GET", backend, 1), "delay": 40})
        load = asyncio.ensure_future(get(backend, [1], 5000))
        await seen(server, "GET")
        await backend.close()
        with pytest.raises(BackendError, match="closed"):
            await load


# The opening.


async def test_a_bucket_that_is_not_there_is_refused_at_once(server: Server) -> None:
    backend = server.backend("x")
    server.faults({"request": "GET .*", "status": 404, "code": "NoSuchBucket"})
    with pytest.raises(ConfigError, match=r"cannot be used: 404 .*NoSuchBucket"):
        await backend.open()
    await backend.close()


@pytest.mark.parametrize("code", ["AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"])
async def test_credentials_that_are_wrong_are_refused_at_once(server: Server, code: str) -> None:
    server.faults({"request": ".*", "status": 403, "code": code})
    backend = server.backend("x")
    with pytest.raises(ConfigError, match=rf"cannot be used: 403 .*{code}") as caught:
        await backend.open()
    assert not secret(repr(caught.value))
    await backend.close()


@pytest.mark.parametrize("fault", [SLOW_DOWN, {"reset": "before"}, {"delay": 50}], ids=str)
async def test_a_server_that_is_not_there_yet_is_no_reason_not_to_open(
    server: Server, fault: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    server.faults({"request": ".*"} | fault)
    backend = server.backend(f"late-{next(numbers)}")
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        await backend.open()
    assert time.monotonic() - began < 25  # a lookup's second, and a busy machine
    assert "cannot be listed now" in caplog.text and not secret(caplog.text)
    server.faults()
    assert await put(backend, [1], 5000) == [True]
    assert backend.usage().objects == 1
    await backend.close()


async def test_a_dead_endpoint_is_told_soon(server: Server) -> None:
    dead = Server.__new__(Server)
    dead.port = 1
    backend = dead.backend("x")
    await backend.open()
    for call in (find(backend, range(256)), get(backend, range(64), 100), put(backend, range(64), 100)):
        began = time.monotonic()
        with pytest.raises(BackendError, match="no connection"):
            await call
        assert time.monotonic() - began < 30  # retries are by milliseconds, and not by minutes
    await backend.close()
    await backend.close()
