"""Explanations and events of a server: over both kinds of sockets, from a thread, for slow readers, and for tenants,
who learn nothing of each other."""

import asyncio
import itertools

import pytest
from contract.support import LAYOUT, count_hits, fill, make_layout, make_prompt, make_tokens

from async_cache import (
    AccessDeniedError,
    BlockingClient,
    ChunkState,
    ConnectionLostError,
    Elsewhere,
    LimitError,
    Missed,
    Removal,
    Removed,
    Skipped,
    Span,
    Stored,
    connect,
)
from async_cache.protocol import messages

from .programs import server
from .support import Peer, wait_until

RED, BLUE, ENGINE = (f"token-of-{name:_<16}" for name in ("red", "blue", "engine"))
CONFIG = f"""
explain_chunks = 100000

[server.tenants.red]
tokens = ["{RED}"]
salts = ["red", "shared"]

[server.tenants.blue]
tokens = ["{BLUE}"]
salts = ["blue", "shared"]

[server.tenants.engine]
tokens = ["{ENGINE}"]
"""
CHUNKS = 3
UNIX, TCP = 0, 1
numbers = itertools.count(100)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    directory = tmp_path_factory.mktemp("why")
    (directory / "config.toml").write_text(CONFIG)
    urls = f"unix://{directory}/s", "tcp://127.0.0.1:0"
    with server(directory, *urls, l2=["memory://small?capacity=2MiB"], config=directory / "config.toml") as served:
        yield served


async def taken(events, count):
    return [await anext(events) for _ in range(count)]


@pytest.mark.parametrize("where", [UNIX, TCP], ids=["unix", "tcp"])
@pytest.mark.parametrize("token", [ENGINE, RED], ids=["trusted", "bound"])
async def test_a_client_is_explained_what_happened_and_told_as_it_does(served, where, token):
    number = next(numbers)
    prompt = make_prompt(CHUNKS, number, salt="red")
    async with connect(served.urls[where], token=token) as cache:
        events = cache.events()
        await fill(cache, prompt)
        await cache.flush()
        stored = await taken(events, 2 * CHUNKS)
        assert [(event.tier, event.chunk_hash) for event in stored] == [
            (tier, chunk_hash) for tier in ("l1", "l2") for chunk_hash in prompt.chunk_hashes
        ]
        assert (await cache.explain(prompt)).spans == (Span(0, CHUNKS, ChunkState.L1),)
        await cache.delete(prompt)
        removed = await taken(events, 2 * CHUNKS)
        assert all(type(event) is Removed and event.removal is Removal.DELETED for event in removed)
        explanation = await cache.explain(prompt)
        (span,) = explanation.spans
        assert (span.state, span.removal, span.backend) == (ChunkState.REMOVED, Removal.DELETED, "small")
        assert (await cache.lookup(prompt)).missed == explanation.missed == Missed(ChunkState.REMOVED, Removal.DELETED)


def test_a_client_in_a_thread_can_do_the_same(served):
    prompt = make_prompt(CHUNKS, next(numbers), salt="red")
    with BlockingClient(served.url, token=ENGINE) as cache:
        events = cache.events()
        assert events.take() == []
        with cache.store(prompt) as writer:
            for chunk in writer:
                chunk.commit()
        assert [next(events).chunk_hash for _ in range(CHUNKS)] == prompt.chunk_hashes
        assert cache.explain(prompt).spans == (Span(0, CHUNKS, ChunkState.L1),)
        cache.delete(prompt)
        events.close()
        assert list(events) == []
        again = cache.events()
    with pytest.raises(Exception, match="closed"):
        list(again)


async def test_the_connection_ends_a_stream_behind_what_was_told(tmp_path):
    prompt = make_prompt(CHUNKS)
    with server(tmp_path) as served:
        async with connect(served.url) as cache:
            events = cache.events()
            await fill(cache, prompt)
            await cache.flush()
            served.kill()
            assert [event.tier for event in await taken(events, 2 * CHUNKS)] == ["l1"] * CHUNKS + ["l2"] * CHUNKS
            with pytest.raises(ConnectionLostError):
                await anext(events)


async def test_a_stream_that_begins_without_a_connection_is_lost(tmp_path):
    with server(tmp_path) as served:
        async with connect(served.url) as cache:
            served.kill()
            with pytest.raises(ConnectionLostError):
                await cache.ping()
            with pytest.raises(ConnectionLostError):
                await anext(cache.events())


# Tenants.


async def test_a_tenant_is_explained_nothing_of_another(served):
    """Both have the same tokens, under an adapter that only one uses; what is shared, is seen by both."""
    tokens = make_tokens(CHUNKS, next(numbers))
    other_layout = make_layout(revision="r2")
    async with (
        connect(served.url, token=RED) as red,
        connect(served.url, token=BLUE) as blue,
        connect(served.url, token=ENGINE) as engine,
    ):
        await fill(red, LAYOUT.prompt(tokens, salt="red"))
        await fill(red, LAYOUT.prompt(tokens, salt="red", adapter="lora"))
        await fill(red, other_layout.prompt(tokens, salt="red"))
        await red.delete(LAYOUT.prompt(tokens, salt="red"))
        for prompt in (
            LAYOUT.prompt(tokens, salt="blue"),
            LAYOUT.prompt([*tokens[:4], *tokens[:4]], salt="blue"),
            LAYOUT.prompt(tokens, salt="blue", adapter="lora"),
            other_layout.prompt(tokens, salt="blue"),
        ):
            explanation = await blue.explain(prompt)
            assert explanation.spans == (Span(0, len(prompt), ChunkState.UNKNOWN),)
            assert explanation.elsewhere == () and explanation.missed == Missed(ChunkState.UNKNOWN)
            assert (await blue.lookup(prompt)).missed == Missed(ChunkState.UNKNOWN)
            with pytest.raises(AccessDeniedError):
                await blue.explain(type(prompt)(prompt.layout, prompt.root, len(tokens), "red", "", prompt.source))
        own = await red.explain(LAYOUT.prompt(tokens, salt="red"))
        assert {found.differs for found in own.elsewhere} == {("adapter",), ("revision",)}
        assert (await engine.explain(LAYOUT.prompt(tokens, salt="red"))).elsewhere == own.elsewhere
        await fill(red, LAYOUT.prompt(tokens, salt="shared", adapter="lora"))
        shared = await blue.explain(LAYOUT.prompt(tokens, salt="shared"))
        assert shared.elsewhere == (Elsewhere("model", "", "lora", ("adapter",), CHUNKS),)


async def test_a_tenant_that_sends_digests_to_be_explained_is_refused(served):
    prompt = make_prompt(CHUNKS, next(numbers), salt="red")
    with Peer(served.url, token=BLUE) as peer:
        peer.register(LAYOUT)
        peer.answers(1)
        digests = messages.Digests(0, prompt.root, prompt.tokens, "blue", b"".join(prompt.chunk_hashes))
        peer.send(messages.Explain(peer.number(), digests))
        (failed,) = peer.answers(1)
        assert isinstance(failed, messages.Failed) and failed.code == "access_denied"


async def test_a_tenant_hears_of_its_own_salts_only_in_whatever_tier(served):
    """Also of what a small backend evicts, long after it has left memory."""
    async with (
        connect(served.url, token=RED) as red,
        connect(served.url, token=BLUE) as blue,
        connect(served.url, token=ENGINE) as engine,
    ):
        await engine.clear("all")
        listeners = {"red": red.events(), "blue": blue.events(), "engine": engine.events()}
        prompts = {"red": [], "blue": [], "shared": []}
        for salt, client in itertools.islice(itertools.cycle([("red", red), ("blue", blue), ("shared", red)]), 30):
            prompt = make_layout(model=salt).prompt(make_tokens(CHUNKS, next(numbers)), salt=salt)
            prompts[salt].append(prompt)
            await fill(client, prompt)
        await red.flush()
        await engine.clear("l1")
        for salt, client in (("red", red), ("blue", blue), ("shared", blue)):
            for prompt in prompts[salt][::2]:
                await client.delete(prompt)
        await engine.clear("all")
        told = {}
        for name, client in (("red", red), ("blue", blue), ("engine", engine)):
            last = make_prompt(1, next(numbers), salt={"engine": ""}.get(name, name))
            await fill(client, last)
            told[name] = []
            while (event := await anext(listeners[name])).chunk_hash != last.chunk_hashes[0]:
                told[name].append(event)
        hashes = {salt: {h for prompt in own for h in prompt.chunk_hashes} for salt, own in prompts.items()}

        def all_of(*salts):
            return set().union(*(hashes[salt] for salt in salts))

        assert {event.chunk_hash for event in told["red"]} == all_of("red", "shared")
        assert {event.chunk_hash for event in told["blue"]} == all_of("blue", "shared")
        assert {event.chunk_hash for event in told["engine"]} >= all_of("red", "blue", "shared")
        for name, salts in (("red", ("red", "shared")), ("blue", ("blue", "shared"))):
            own = all_of(*salts)
            of_engine = [event for event in told["engine"] if event.chunk_hash in own]
            assert told[name] == of_engine  # all of it, in the same order
            tiers = [(type(event), event.tier) for event in told[name]]
            assert all(tiers.count((kind, tier)) == len(own) for kind in (Stored, Removed) for tier in ("l1", "l2"))


# Those who do not read.


async def store_and_delete(cache, prompt):
    await fill(cache, prompt)
    await cache.flush()
    await cache.delete(prompt)


async def test_a_reader_that_is_slow_costs_little_and_is_told_how_much_it_missed(tmp_path):
    many = make_prompt(4096)
    with server(tmp_path) as served:
        async with connect(served.url) as cache:
            await store_and_delete(cache, many)
            with Peer(served.url) as peer:
                peer.send(messages.Events(number := peer.number(), 1000))
                (begun,) = peer.answers(1)
                assert begun == messages.Happened(number, [])
                before = served.resident_bytes()
                for _ in range(5):
                    await store_and_delete(cache, many)
                assert served.resident_bytes() - before < 8 * 2**20  # those that were missed have 8 MiB and more
                counted = 0
                while counted < 5 * 4 * 4096:
                    for answer in peer.answers(1):
                        assert answer.number == number
                        skipped = [event for event in answer.events if isinstance(event, Skipped)]
                        counted += len(answer.events) - len(skipped) + sum(event.count for event in skipped)
                assert counted == 5 * 4 * 4096
            await cache.ping()


async def test_a_stream_that_is_given_up_holds_nothing_on_the_server(tmp_path):
    with server(tmp_path) as served:
        with Peer(served.url) as peer:
            for _ in range(200):
                number = peer.number()
                peer.send(messages.Events(number))
                assert peer.answers(1) == [messages.Happened(number, [])]
                cancel = peer.number()
                peer.send(messages.Cancel(cancel, number))
                failed, done = peer.answers(2)
                assert failed.number == number and failed.code == "cancelled" and done == messages.Done(cancel)
        async with connect(served.url) as cache:
            events = [cache.events() for _ in range(16)]
            with pytest.raises(LimitError, match="16 streams"):
                await anext(cache.events())
            await cache.ping()
            for stream in events[1:]:
                await stream.aclose()
            prompt = make_prompt(2)
            await fill(cache, prompt)
            assert [(await anext(events[0])).chunk_hash for _ in range(2)] == prompt.chunk_hashes
            assert await count_hits(cache, prompt) == 2

            async def only_one_is_left():
                await cache.ping()
                return len(cache._links.current.calls) == 1

            await wait_until(only_one_is_left)
            waiting = asyncio.create_task(anext(events[0]))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])
