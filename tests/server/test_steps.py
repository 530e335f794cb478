"""What a bound tenant can have the loop do in one step is bounded, whatever it asks for: counted, and not timed."""

import asyncio
import threading
from collections import Counter
from contextlib import asynccontextmanager, contextmanager
from unittest.mock import patch

import pytest
from client.servers import SECONDS, short_directory

from async_cache import AsyncCache, CacheConfig, ObjectGroup, ServerConfig
from async_cache.config import TenantConfig
from async_cache.handles.writer import WriteChunk
from async_cache.l1.store import L1Store
from async_cache.prompt.layout import ModelLayout
from async_cache.protocol import messages as m
from async_cache.protocol.connection import Connection
from async_cache.protocol.prompts import describe, unpack
from async_cache.read import decision
from async_cache.read.plan import Planner
from async_cache.read.search import Search
from async_cache.server import Server, queries
from async_cache.server.layouts import Layouts
from async_cache.server.prefetches import HeldPrefetch
from async_cache.write.removal import Remover
from async_cache.write.writeback import Writeback

from .support import Peer

TOKEN = "token-of-a-bound-tenant"
MANY = 2048  # chunks
ONE = ModelLayout("one", (ObjectGroup((1,), "uint8"),), chunk_tokens=1)
FRAMES = 128  # that are sent in a step: some milliseconds


class Bound(Peer):
    """A client of a token that is bound to a salt, in a thread: the server has the loop of the test."""

    def __init__(self, url):
        super().__init__(url, token=TOKEN)
        self.socket.settimeout(SECONDS)
        self._come = []

    def ask(self, *sent, until):
        """Send these in one piece; the first answer of a kind, and all before it are let go."""
        self.send(*sent)
        while True:
            if not self._come:
                self._come = self.answers(1)
            answer = self._come.pop(0)
            assert isinstance(answer, until) or not isinstance(answer, m.Failed), answer
            if isinstance(answer, until):
                return answer

    def store(self, prompt, chunks, step=1):
        """All of its chunks, of one byte each, or each of so many."""
        store = self.number()
        self.ask(m.ReserveStore(store, prompt), until=m.StoreReserved)
        for position in range(0, chunks, step):
            self.send(m.StoreData(store, position, 0, b"x"))
            self.ask(m.CommitStore(self.number(), store, position, None), until=m.Done)
        self.ask(m.CloseStore(self.number(), store), until=m.Done)


def ids(count, first=0):
    return m.TokenIds(0, "red", "", b"".join(n.to_bytes(4, "little") for n in range(first, first + count)))


@asynccontextmanager
async def serving(attack):
    """Have an attack run in a thread, on a server in this loop: what came of it, and the cache."""
    with short_directory() as directory:
        url = f"unix://{directory}/s"
        tenants = {"red": TenantConfig(tokens=(TOKEN,), salts=("red",))}
        cache = AsyncCache(CacheConfig(l1_bytes=2**25, l2=("memory://",)))
        async with cache, Server(cache, ServerConfig(listen=(url,), tenants=tenants)):

            def run():
                with Bound(url) as peer:
                    peer.ask(m.RegisterLayout(peer.number(), 0, describe(ONE)), until=m.LayoutRegistered)
                    return attack(peer)

            yield await asyncio.to_thread(run), cache


@contextmanager
def counted(owner, name):
    """How often a method is called in each step of the loop, by the number of the step."""
    steps, number, call = Counter(), 0, getattr(owner, name)
    run = asyncio.events.Handle._run

    def step(handle):
        nonlocal number
        number += 1
        run(handle)

    def count(*arguments):
        steps[number] += 1
        return call(*arguments)

    with patch.object(asyncio.events.Handle, "_run", step), patch.object(owner, name, count):
        yield steps


@pytest.mark.parametrize("kind", [m.AcquireRead, m.AcquireStream])
async def test_bytes_of_very_small_chunks_are_sent_in_turns(kind):
    def read(peer):
        peer.store(ids(MANY), MANY)
        peer.ask(m.Prefetch(peer.number(), ids(MANY), "r"), until=m.LoadDone)
        until = m.ReadData if kind is m.AcquireRead else m.StreamEnded
        peer.ask(kind(number := peer.number(), "r"), until=until)
        return peer.ask(m.ReleaseRead(peer.number(), number), until=m.Done)

    with counted(Connection, "send") as sent:
        async with serving(read):
            pass
    assert 8 < max(sent.values()) <= FRAMES


async def test_what_a_thread_takes_apart_is_begun_in_its_order_and_what_is_none_ends_the_connection():
    digests = m.EngineDigests(0, "red", "", [n.to_bytes(32, "big") for n in range(20_000)])
    broken = m.EngineDigests(0, "red", "", [b"x" * (8 + n % 2) for n in range(131_073)])

    def ask(peer):
        number = peer.number()
        hits = peer.ask(m.Prefetch(peer.number(), digests, "r"), m.QueryPrefetchLookupHits(number, "r"), until=m.Hits)
        assert (hits.number, hits.hits.chunks) == (number, 0)
        return peer.ask(m.Lookup(peer.number(), broken), m.Ping(peer.number()), until=m.Failed)

    async with serving(ask) as (refused, _):
        assert (refused.number, refused.code) == (0, "protocol")


async def test_a_connection_that_ends_while_its_prompts_are_made_is_no_fault(caplog):
    begun, gone = threading.Event(), threading.Event()

    def slowly(wire, layout):
        begun.set()
        assert gone.wait(SECONDS)
        return unpack(wire, layout)

    def leave(peer):
        peer.send(m.PrefetchSegments(peer.number(), [ids(MANY), ids(MANY, MANY)], "r"))
        assert begun.wait(SECONDS)

    close = Layouts.close
    with (
        patch("async_cache.server.layouts.unpack", slowly),
        patch.object(Layouts, "close", lambda layouts: (close(layouts), gone.set())),
    ):
        async with serving(leave):
            pass
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_what_a_connection_has_held_is_given_back_in_turns_when_it_is_gone():
    def hold(peer):
        peer.store(ids(4), 4)
        for _ in range(1000):
            number = peer.number()
            peer.ask(m.Prefetch(number, ids(4), f"r{number}"), until=m.LoadDone)

    with counted(HeldPrefetch, "release") as released:
        async with serving(hold) as (_, cache):
            while len(cache.core.requests) or cache.core.l1.leases:  # noqa: ASYNC110 (each turn gives back some)
                await asyncio.sleep(0)
    assert sum(released.values()) >= 1000 and max(released.values()) <= 64


async def test_a_model_is_deleted_in_turns_also_in_memory():
    def delete(peer):
        peer.store(ids(MANY), MANY)
        return peer.ask(m.DeleteModel(peer.number(), "one"), until=m.ModelDeleted)

    with counted(Remover, "_remove") as removed:
        async with serving(delete) as (deleted, _):
            assert deleted.deleted.chunks == MANY
    assert max(removed.values()) <= 2 and sum(removed.values()) >= MANY // 256


async def test_a_writer_of_very_many_chunks_that_came_in_frames_is_closed_at_once():
    def write(peer):
        store = peer.number()
        peer.ask(m.ReserveStore(store, ids(MANY)), until=m.StoreReserved)
        for position in range(MANY):
            peer.send(m.StoreData(store, position, 0, b"x"))
            if position % 2:
                peer.ask(m.CommitStore(peer.number(), store, position, None), until=m.Done)
        peer.ask(m.CloseStore(peer.number(), store), until=m.Done)

    with counted(WriteChunk, "_release_views") as released, counted(L1Store, "quarantine") as quarantined:
        async with serving(write) as (_, cache):
            assert (await cache.lookup(ONE.prompt(range(MANY), salt="red"))).chunks == 0
            cache.check_integrity()
    assert sum(released.values()) >= MANY and max(released.values()) <= FRAMES
    assert not quarantined, "nobody sees what was not committed"


async def filled(cache, chunks):
    async with cache.store(ONE.prompt(range(chunks))) as writer:
        for chunk in writer:
            chunk.commit()
    await cache.flush()


async def test_what_was_dropped_is_written_back_in_turns_when_it_is_stored_again():
    async with AsyncCache(CacheConfig(l1_bytes=2**25, l2=("memory://",))) as cache:
        await filled(cache, MANY)
        for entry in cache.core.l1.index.values():
            entry.dropped = True
        with counted(Writeback, "enqueue") as enqueued:
            assert not (await cache.store(ONE.prompt(range(MANY)))).chunks
        assert sum(enqueued.values()) == MANY and max(enqueued.values()) <= 512


async def test_a_long_prompt_is_planned_in_another_step_than_its_last_chunks_are_looked_up_in():
    async with AsyncCache(CacheConfig(l1_bytes=2**25, l2=("memory://",))) as cache:
        await filled(cache, 256)
        with (
            patch.object(decision, "_LOOKED_UP_AT_ONCE", 64),
            counted(Search, "ask") as asked,
            counted(Planner, "plan") as planned,
        ):
            assert (await cache.prefetch(ONE.prompt(range(300))).load_done).chunks == 256
        assert sum(planned.values()) == 1 and asked and not asked.keys() & planned.keys()


async def test_an_explanation_of_very_many_spans_is_encoded_in_turns():
    def explain(peer):
        peer.store(ids(6000), 6000, step=2)
        return peer.ask(m.Explain(peer.number(), ids(6000)), until=m.Explained).explanation

    with counted(queries, "encode_each") as encoded:
        async with serving(explain) as (explanation, _):
            assert [span.start_chunk for span in explanation.spans] == list(range(6000))
    assert list(encoded.values()) == [1, 1, 1]
