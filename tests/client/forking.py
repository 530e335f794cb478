"""A program with an embedded cache and clients of a server, which forks in the middle of what they hold.

`forking.py CHILD LOOP URL DIRECTORY`: CHILD is what the child does, a function of this file.
"""

import asyncio
import gc
import inspect
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop

sys.path.insert(0, str(Path(__file__).parent.parent))

from contract.support import assert_nothing_held, fill, fill_l2, make_prompt, read_back, verify, write

from async_cache import AsyncCache, BlockingClient, CacheConfig, connect

FIRST, SECOND, OWN, TOLD = (make_prompt(3, number) for number in range(4))
CHILD, LOOP, URL, DIRECTORY = sys.argv[1:]
RUN: Callable[..., Any] = uvloop.run if LOOP == "uvloop" else asyncio.run


def make_cache(name: str) -> AsyncCache:
    return AsyncCache(CacheConfig(l1_bytes=2**20, l2=[f"fs://{DIRECTORY}/{name}"]))


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


# What the child does.


def exits(parents: Any) -> None:
    return


def collects(parents: Any) -> None:
    parents.clear()
    gc.collect()


def opens_its_own(parents: Any) -> None:
    async def use() -> None:
        async with make_cache("child") as cache, connect(URL) as client:
            await fill_l2(cache, OWN)
            await fill(client, OWN)
            assert await read_back(cache, OWN) == await read_back(client, OWN) == len(OWN)

    RUN(use())
    with BlockingClient(URL) as client:
        client.ping()


def uses_its_parents(parents: Any) -> None:
    cache, client, blocking = parents[:3]
    for call in (
        lambda: cache.prefetch(FIRST),
        lambda: cache.store(OWN),
        lambda: RUN(cache.stats()),
        lambda: client.prefetch(FIRST),
        lambda: RUN(client.lookup(OWN)),
        lambda: RUN(client.ping()),
        lambda: blocking.ping(),
        lambda: blocking.prefetch(FIRST),
    ):
        try:
            call()
            say(f"nothing is said to {inspect.getsource(call)}")
        except Exception as error:
            say(f"{type(error).__name__}: {error}")
    blocking.close()


def waits_for_its_parents(parents: Any) -> None:
    blocking, events, *writers = parents[2], *parents[-2:], parents[4], parents[6]

    def leave() -> None:
        with writers[0]:
            pass

    for call in (*(writer[1].commit for writer in writers), leave, lambda: next(events), events.close):
        try:
            call()
            say("nothing is said")
        except Exception as error:
            say(f"{type(error).__name__}: {error}")
    say(str([chunk.committed for writer in writers for chunk in writer]))
    blocking.close()


def waits_for_a_prefetch(parents: Any) -> None:
    for future in (PENDING[0].lookup_done, PENDING[0].load_done):
        say(f"{future.done()} {type(future.exception()).__name__}")
        try:
            say(f"{future.result()}")
        except Exception as error:
            say(f"{type(error).__name__}: {error}")


# The parent.

PENDING: list[Any] = []


async def main() -> None:
    async with make_cache("parent") as cache, connect(URL) as client:
        blocking = BlockingClient(URL)
        await asyncio.to_thread(blocking.open)
        held: list[Any] = [cache, client, blocking]
        for each in (cache, client):
            await fill(each, FIRST)
            await each.prefetch(FIRST, request_id="a").load_done
            held.append(await each.read("a"))
            held.append(await each.store(SECOND))
            write(next(iter(held[-1])), SECOND)
        blocking.prefetch(FIRST).load_done.result()
        held += await asyncio.to_thread(lambda: (blocking.events(), blocking.store(OWN)))
        await fill(client, TOLD)
        while not held[-2]._stream._events:  # noqa: ASYNC110 (it is the client's own thread that hears of it)
            await asyncio.sleep(0)
        PENDING.append(blocking.prefetch(OWN, wait_for_writers_seconds=1000))
        leases = (await client.stats()).leases
        await fork(held)
        assert (await client.stats()).leases == leases
        for each, lease, writer in ((cache, *held[3:5]), (client, *held[5:7])):
            assert verify(lease, FIRST) == [0, 1, 2]
            for chunk in writer:
                write(chunk, SECOND)
                chunk.commit()
            writer.close()
            lease.release()
            assert await read_back(each, SECOND) == len(SECOND)
            await each.end_request("a")
        assert not PENDING[0].lookup_done.done()
        PENDING[0].cancel()
        assert (await asyncio.to_thread(PENDING[0].load_done.result)).chunks == 0
        assert (await cache.flush()).pending == 0
        await assert_nothing_held(cache)
        blocking.ping()
        held[-1].close()
        blocking.close()
    say("parent ok")


async def fork(parents: list[Any]) -> None:
    """Return when the child has ended, and all went well there."""
    if CHILD == "is_a_process_of_multiprocessing":
        process = multiprocessing.get_context("fork").Process(target=gc.collect)
        process.start()
        child = process.pid
    else:
        child = os.fork()
        if not child:
            asyncio._set_running_loop(None)  # as it is from Python 3.12 on
            try:
                globals()[CHILD](parents)
                os._exit(0)
            finally:
                os._exit(1)
    _, status = await asyncio.to_thread(os.waitpid, child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


RUN(main())
