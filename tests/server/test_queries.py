"""A query that is sent right behind its prefetch never misses it."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
from contract.support import CHUNK_TOKENS, LAYOUT, OBJECT_BYTES, fill, make_prompt, make_tokens
from soak import rounds

from async_cache import BlockingClient, ModelLayout, ObjectGroup, connect
from async_cache.protocol import messages
from async_cache.protocol.prompts import describe, pack

from .programs import server
from .support import Peer, given_back

CHUNKS = 4
THREADS = 4


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    directory = tmp_path_factory.mktemp("queries")
    with server(directory, f"unix://{directory}/s", "tcp://127.0.0.1:0", l2=[f"fs://{directory}/l2"]) as served:
        yield served


def fresh(number):
    """A prompt of which nothing has been hashed: of which everything is cached, or half, or nothing."""
    return LAYOUT.prompt(make_tokens(CHUNKS, number % 3))


HITS = [CHUNKS, CHUNKS // 2, 0]


async def store_some(cache):
    await fill(cache, fresh(0))
    await fill(cache, fresh(1), chunks=range(CHUNKS // 2))
    await cache.flush()


@pytest.mark.parametrize("kind", [0, 1], ids=["unix", "tcp"])
async def test_a_query_right_behind_its_prefetch_finds_it(served, kind):
    async with connect(served.urls[kind]) as cache:
        await store_some(cache)
        for number in range(rounds(300, 10_000)):
            if number % 50 == 0:
                await cache.clear("l1")
            prefetch = cache.prefetch(fresh(number), request_id=f"r{number}")
            asked = [cache.query_lookup_hits(prefetch.request_id), cache.query_status(prefetch.request_id)]
            hits, result = await asyncio.gather(*asked)
            assert hits.chunks == result.chunks == HITS[number % 3]
            if result.chunks:
                async with cache.read(prefetch.request_id) as lease:
                    assert len(lease) == result.chunks
        await given_back(cache)


async def test_a_blocking_query_right_behind_its_prefetch_finds_it(served):
    with BlockingClient(served.url) as cache, ThreadPoolExecutor(THREADS) as threads:

        def ask(thread):
            for number in range(rounds(100, 3_000)):
                prefetch = cache.prefetch(fresh(number), request_id=f"{thread}-{number}")
                assert cache.query_lookup_hits(prefetch.request_id).chunks == HITS[number % 3]
                assert cache.query_status(prefetch.request_id).chunks == HITS[number % 3]
                cache.end_request(prefetch.request_id)
            return number + 1

        async with connect(served.url) as other:
            await store_some(other)
            asked = await asyncio.gather(*(asyncio.wrap_future(threads.submit(ask, n)) for n in range(THREADS)))
            assert sum(asked) == THREADS * rounds(100, 3_000)
            await given_back(other)


async def test_another_thread_may_ask_as_soon_as_prefetch_has_returned(served):
    with BlockingClient(served.url) as cache, ThreadPoolExecutor(1) as other_thread:
        for number in range(rounds(300, 3_000)):
            prefetch = cache.prefetch(fresh(number))
            asked = other_thread.submit(cache.query_status, prefetch.request_id)
            assert asked.result().chunks == HITS[number % 3]
            assert prefetch.lookup_done.result().chunks == prefetch.load_done.result().chunks == HITS[number % 3]
            cache.end_request(prefetch.request_id)


async def test_another_client_may_ask_as_soon_as_the_hits_are_known(served):
    async with connect(served.url) as scheduler, connect(served.url) as worker:
        await store_some(scheduler)
        for number in range(rounds(300, 3_000)):
            prefetch = scheduler.prefetch(fresh(number), request_id=f"o{number}")
            hits = await prefetch.lookup_done
            assert (await worker.query_lookup_hits(prefetch.request_id)).chunks == hits.chunks == HITS[number % 3]
            assert (await worker.query_status(prefetch.request_id)).chunks == hits.chunks
            await worker.end_request(prefetch.request_id)


@pytest.mark.parametrize("kind", [0, 1], ids=["unix", "tcp"])
@pytest.mark.parametrize("trusted", [True, False], ids=["digests", "token ids"])
def test_all_in_one_piece_is_taken_in_order(served, kind, trusted):
    """Layout, prefetch, both queries, read: sent before the server has answered anything, byte by byte or at once."""
    layout = ModelLayout(f"new {kind} {trusted}", (ObjectGroup((OBJECT_BYTES,), "uint8"),), chunk_tokens=CHUNK_TOKENS)
    prompt = make_prompt(CHUNKS, 7, layout)
    for round_ in range(rounds(20, 500)):
        with Peer(served.urls[kind]) as peer:
            begun = messages.Prefetch(peer.number(), pack(prompt, 3, trusted=trusted), "same")
            asked = [
                messages.QueryPrefetchLookupHits(peer.number(), "same"),
                messages.AcquireRead(peer.number(), "same"),
                messages.QueryPrefetchStatus(peer.number(), "same"),
            ]
            sent = [messages.RegisterLayout(peer.number(), 3, describe(layout)), begun, *asked]
            if round_ % 2:
                peer.send(*sent)
            else:
                for message in sent:
                    peer.send(message)
            answers = peer.answers(7)  # nothing is cached: its claim ends it
            kinds = {answer.number: type(answer) for answer in answers if answer.number != begun.number}
            assert kinds == {
                sent[0].number: messages.LayoutRegistered,
                asked[0].number: messages.Hits,
                asked[1].number: messages.ReadAcquired,
                asked[2].number: messages.Loaded,
            }
            pushed = [type(answer) for answer in answers if answer.number == begun.number]
            assert pushed == [messages.LookupDone, messages.LoadDone, messages.RequestOver]
