"""A client that is killed: all that it held is back at once, and other clients notice nothing."""

import asyncio

import pytest
from contract.support import PAGE, count_hits, fill, make_prompt, read_back, verify, write
from soak import rounds

from async_cache import connect

from .holder import LEASES, PROMPT, RESERVATIONS, reserved_prompt
from .programs import heard, program, server
from .support import descriptors_given_back, given_back, held

AT_ONCE_SECONDS = 60  # of a server whose leases and reservations live for an hour: only the end of it gives them back
LIVES = dict.fromkeys(("lease_ttl_seconds", "reservation_ttl_seconds", "result_ttl_seconds"), 3600)
OWN = make_prompt(5, 77)
UNFINISHED = make_prompt(1, 78)


async def look_and_ping(cache, stop):
    """What any client may do at any time, again and again: how often it could."""
    done = 0
    while not stop.is_set():
        assert await count_hits(cache, PROMPT) == len(PROMPT)
        assert await cache.ping() < AT_ONCE_SECONDS
        done += 1
    return done


@pytest.mark.parametrize("manner", ["idle", "busy"])
async def test_a_killed_client_leaves_nothing_and_harms_nobody(tmp_path, manner):
    with server(tmp_path, l2=["memory://"], **LIVES) as served:
        async with connect(served.url) as cache, connect(served.url) as other:
            await fill(cache, PROMPT)
            await fill(cache, OWN)
            await cache.flush()
            lease = await cache.read((await cache.prefetch(OWN).load_done).request_id)
            writer = await cache.store(UNFINISHED)
            before = await cache.stats()
            descriptors = served.descriptors()
            stop = asyncio.Event()
            watching = asyncio.create_task(look_and_ping(other, stop))
            for _ in range(rounds(3, 50)):
                with program("server.holder", served.url, manner) as child:
                    assert await asyncio.to_thread(heard, child) == "holds"
                    during = await cache.stats()
                    assert during.leases == before.leases + LEASES
                    assert during.reserved_bytes >= before.reserved_bytes + RESERVATIONS * PAGE
                    child.kill()
                    await given_back(cache, held(before), AT_ONCE_SECONDS)
                for number in range(RESERVATIONS):
                    assert await count_hits(cache, reserved_prompt(number)) == 0
                assert verify(lease, OWN) == list(range(len(OWN)))
            stop.set()
            assert await watching
            await descriptors_given_back(served, cache, descriptors)
            with writer, lease:
                (chunk,) = writer
                write(chunk, UNFINISHED)
                chunk.commit()
            assert await read_back(cache, UNFINISHED) == 1
            await cache.flush()
            await given_back(cache)
