"""Two clients, two ranks, one request: the scheduler prefetches, the workers read, and the request ends once."""

import asyncio
import hashlib

import pytest
from contract.support import PAGE, TWO_RANKS, fill, make_layout, make_prompt, pattern, verify
from soak import rounds

from async_cache import ObjectGroup, ReadConflictError, UnknownRequestError, connect

from .programs import heard, program, server, tell
from .support import MIB, NOTHING, given_back

LARGE = make_layout(ObjectGroup((MIB + 7,), "uint8"), ObjectGroup((33,), "uint8"), world_size=2)
CHUNKS = 3


def expected(prompt, rank):
    parts = [pattern(prompt, n, rank, group) for n in range(len(prompt)) for group in range(len(prompt.layout.groups))]
    return f"{len(prompt)} {hashlib.sha256(b''.join(parts)).hexdigest()}"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    urls = f"unix://{directory}/s", "tcp://127.0.0.1:0"
    with server(directory, *urls, l2=[f"fs://{directory}/l2"]) as served:
        yield served


@pytest.mark.parametrize("kind", [0, 1], ids=["mapped", "in frames"])
@pytest.mark.parametrize("layout", [TWO_RANKS, LARGE], ids=["small", "large"])
async def test_both_workers_read_their_rank_and_the_lease_ends_once(served, layout, kind):
    prompt = make_prompt(CHUNKS, 1, layout)
    async with connect(served.url) as scheduler:
        await fill(scheduler, prompt)
        await scheduler.flush()
        await scheduler.clear("l1")
        with program("server.worker", served.urls[kind], 0) as first, program("server.worker", served.url, 1) as second:
            for _ in range(rounds(5, 200)):
                prefetch = scheduler.prefetch(prompt, request_id="shared")
                await prefetch.lookup_done
                for rank, worker in enumerate((first, second)):
                    tell(worker, "read shared")
                    assert await asyncio.to_thread(heard, worker) == expected(prompt, rank)
                assert (await scheduler.stats()).leases == CHUNKS
                tell(first, "release")
                assert await asyncio.to_thread(heard, first) == "left"
                stats = await scheduler.stats()
                assert (stats.requests, stats.leases) == (1, CHUNKS)
                tell(second, "release")
                assert await asyncio.to_thread(heard, second) == "left"
                await given_back(scheduler)
                with pytest.raises(UnknownRequestError):
                    await scheduler.query_lookup_hits("shared")


async def test_readers_who_leave_at_the_same_time_end_it_once(served):
    """The id is free at once, for another prompt, and the scheduler's prefetch knows."""
    prompts = [make_prompt(CHUNKS, number, TWO_RANKS) for number in (11, 12)]
    async with connect(served.url) as scheduler, connect(served.url) as one, connect(served.urls[1]) as other:
        for prompt in prompts:
            await fill(scheduler, prompt)

        async def read(worker, rank, prompt):
            async with worker.read("shared", rank=rank) as lease:
                assert verify(lease, prompt, rank) == list(range(CHUNKS))
                with pytest.raises(ReadConflictError):
                    await scheduler.read("shared", rank=rank)
            await worker.ping()

        for number in range(rounds(100, 3_000)):
            prompt = prompts[number % 2]
            prefetch = scheduler.prefetch(prompt, request_id="shared")
            await prefetch.lookup_done
            await asyncio.gather(read(one, number % 2, prompt), read(other, 1 - number % 2, prompt))
            await scheduler.ping()
            assert (await scheduler.stats()).requests == 0
        await given_back(scheduler)


async def test_a_worker_that_dies_leaves_the_request_to_the_others(served):
    prompt = make_prompt(CHUNKS, 21, TWO_RANKS)
    async with connect(served.url) as scheduler:
        await fill(scheduler, prompt)
        await scheduler.prefetch(prompt, request_id="left").load_done
        with program("server.worker", served.url, 0) as worker:
            tell(worker, "read left")
            assert await asyncio.to_thread(heard, worker) == expected(prompt, 0)
            worker.kill()
        async with scheduler.read("left", rank=1) as lease:
            assert verify(lease, prompt, 1) == list(range(CHUNKS))
        await given_back(scheduler)


async def test_the_request_of_a_scheduler_that_is_gone_is_gone_but_not_under_its_readers(served):
    prompt = make_prompt(CHUNKS, 31, TWO_RANKS)
    async with connect(served.url) as other:
        await fill(other, prompt)
        with program("server.worker", served.url, 0) as worker:
            async with connect(served.url) as scheduler:
                await scheduler.prefetch(prompt, request_id="orphan").load_done
                tell(worker, "read orphan")
                assert await asyncio.to_thread(heard, worker) == expected(prompt, 0)
            await given_back(other, NOTHING | {"leases": CHUNKS, "leased_bytes": 2 * CHUNKS * PAGE})
            with pytest.raises(UnknownRequestError):
                await other.read("orphan", rank=1)
            tell(worker, "release")
            assert await asyncio.to_thread(heard, worker) == "left"
            await given_back(other)
