"""Clients that do not read, or do not even say hello: the others notice nothing, and the server does not grow."""

import asyncio
import select
import socket
import statistics
import time
from contextlib import ExitStack, suppress

import pytest
from contract.support import fill, make_layout, make_prompt
from soak import rounds

from async_cache import LimitError, ObjectGroup, connect
from async_cache.protocol import messages
from async_cache.protocol.frames import frame
from async_cache.protocol.greeting import greet
from async_cache.protocol.messages import VERSION, Hello, encode
from async_cache.protocol.prompts import pack

from .programs import server
from .support import BIG, MIB, Peer, descriptors_given_back, given_back, wait_until

TOKEN = "token-of-a-bound-tenant"
CONFIG = f'[server.tenants.bound]\ntokens = ["{TOKEN}"]\nsalts = ["", "bound"]\n'
READERS = 64
LARGE = make_layout(ObjectGroup((MIB,), "uint8"), readers_per_rank=4096)
LARGE_PROMPT = make_prompt(32, 5, LARGE)
SMALL_PROMPT = make_prompt(2, 6)
MANY_READERS = 2000
GROWTH_BYTES = 24 * MIB
STALL_SECONDS = 0.6
HELLO = frame(encode(Hello(VERSION)))


def serve(directory, **settings):
    """Over a Unix socket it takes a token that is bound to salts: to whom the bytes come in frames."""
    (directory / "config.toml").write_text(CONFIG)
    return server(directory, f"unix://{directory}/s", config=directory / "config.toml", **settings)


def read_much(peer, readers=READERS, request_id="much"):
    """Ask for 2 GiB, and read nothing of it."""
    peer.register(LARGE)
    peer.send(messages.Prefetch(peer.number(), pack(LARGE_PROMPT, 0, trusted=False), request_id))
    peer.send(*(messages.AcquireRead(peer.number(), request_id, 0, reader) for reader in range(readers)))


def ask_much(peer):
    """Ask for the counters until no more can be sent, and hold something meanwhile."""
    peer.register(LARGE)
    peer.send(messages.Prefetch(peer.number(), pack(LARGE_PROMPT, 0, trusted=False), "asked"))
    peer.socket.settimeout(0.2)
    sent = 0
    with suppress(TimeoutError):
        while sent < 64 * MIB:
            asked = b"".join(frame(encode(messages.Stats(peer.number()))) for _ in range(1000))
            peer.socket.sendall(asked)
            sent += len(asked)
    assert sent < 64 * MIB, "the server listens on to a client that does not listen"


KINDS = {
    "large reads": read_much,
    "many answers": ask_much,
    "very many reads": lambda peer: read_much(peer, MANY_READERS),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_that_does_not_read_is_given_up_and_costs_little(tmp_path, kind):
    with serve(tmp_path, server_stall_timeout_seconds=STALL_SECONDS) as served:
        async with connect(served.url) as cache:
            await fill(cache, LARGE_PROMPT)
            await cache.flush()
            await given_back(cache)
            before, descriptors = served.resident_bytes(), served.descriptors()
            began = time.monotonic()
            with Peer(served.url, token=TOKEN) as peer:
                assert peer.arena_fd is None
                KINDS[kind](peer)
                await wait_until(lambda: holds(cache, 1))
                most = 0

                async def is_given_up():
                    nonlocal most
                    most = max(most, served.resident_bytes() - before)
                    return await holds(cache, 0)

                await wait_until(is_given_up)
                assert time.monotonic() - began > STALL_SECONDS * 0.9
                await given_back(cache)
                assert most < GROWTH_BYTES
                await descriptors_given_back(served, cache, descriptors)
                peer.socket.settimeout(60)
                with suppress(ConnectionError):
                    while peer.socket.recv(MIB):
                        pass


async def holds(cache, requests):
    return (await cache.stats()).requests == requests


async def test_a_client_that_reads_slowly_gets_all_of_it(tmp_path):
    """In much more time than the stall timeout, but never silent for so long."""
    with serve(tmp_path, server_stall_timeout_seconds=0.3) as served:
        async with connect(served.url) as cache:
            await fill(cache, LARGE_PROMPT)
            await cache.flush()
            with Peer(served.url, token=TOKEN) as peer:
                began, got_bytes = time.monotonic(), 0
                read_much(peer, readers=1)
                while got_bytes < len(LARGE_PROMPT) * MIB:
                    data = peer.socket.recv(MIB)
                    assert data, f"given up after {got_bytes} bytes"
                    got_bytes += len(data)
                    if time.monotonic() - began < 0.9:
                        await asyncio.sleep(0.03)  # that is how slow it is
                assert time.monotonic() - began > 0.9


class Crowd:
    """Those who disturb: slow readers, half-open connections, and those who ask and ask."""

    def __init__(self, served):
        self._stack = ExitStack()
        self._readers = []
        unix, tcp = served.urls
        for number in range(8):
            for url, token in ((unix, TOKEN), (tcp, TOKEN)):
                peer = self._stack.enter_context(Peer(url, token=token))
                read_much(peer, 16, f"much {number} {url}")
                self._readers.append(peer)
        ask_much(self._stack.enter_context(Peer(unix, token=TOKEN)))
        for url in served.urls:
            for half in (0, 1, 4, len(HELLO) - 1) * 8:
                peer = self._stack.enter_context(Peer(url, hello=False))
                peer.socket.sendall(HELLO[:half])

    def nibble(self):
        """One of them reads a little."""
        self._readers.append(peer := self._readers.pop(0))
        peer.socket.recv(4096)

    def leave(self):
        self._stack.close()


async def busy_seconds(served, cache, crowd, count):
    """What a server does for a ping, and a small prefetch with both answers and the end."""
    began = served.busy_seconds()
    for number in range(count):
        if crowd is not None and number % 8 == 0:
            crowd.nibble()
        await cache.ping()
        prefetch = cache.prefetch(SMALL_PROMPT)
        assert (await prefetch.load_done).chunks == len(SMALL_PROMPT)
        await cache.end_request(prefetch.request_id)
    return (served.busy_seconds() - began) / count


async def compare(served, cache, phases=5, count=300):
    """What a healthy client costs, alone and in the crowd: medians of phases that take turns."""
    alone, crowded = [], []
    for _ in range(phases):
        alone.append(await busy_seconds(served, cache, None, count))
        crowd = Crowd(served)
        for _ in range(10):  # until nothing of the crowd is under way
            await cache.ping()
        crowded.append(await busy_seconds(served, cache, crowd, count))
        crowd.leave()
        await given_back(cache)
    return statistics.median(alone), statistics.median(crowded)


async def test_a_healthy_client_does_not_notice_slow_readers_and_half_open_connections(tmp_path, record_property):
    (tmp_path / "config.toml").write_text(CONFIG)
    urls = f"unix://{tmp_path}/s", "tcp://127.0.0.1:0"
    config = tmp_path / "config.toml"
    with server(tmp_path, *urls, config=config, server_hello_timeout_seconds=600) as served:
        async with connect(served.url) as cache:
            await fill(cache, LARGE_PROMPT)
            await fill(cache, SMALL_PROMPT)
            await cache.flush()
            await busy_seconds(served, cache, None, 300)
            for _ in range(3):  # the machine has others to serve, and its processor other things to remember
                alone, crowded = await compare(served, cache, phases=rounds(3, 20))
                if crowded <= 2 * alone:
                    break
            record_property("alone and crowded", (alone, crowded))
            assert crowded <= 2 * alone


async def ping_seconds(served, cache, readers, count=100):
    """What a server does for a ping, while a peer with so many reads takes a little of them between two."""
    took = []
    with Peer(served.url, token=TOKEN) as peer:
        read_much(peer, readers)
        await wait_until(lambda: holds(cache, 1))
        for _ in range(3):  # in the first, it may be asked still
            began = served.busy_seconds()
            for _ in range(count):
                with suppress(BlockingIOError):
                    peer.socket.recv(64 * 1024, socket.MSG_DONTWAIT)
                await cache.ping()
            took.append((served.busy_seconds() - began) / count)
    await given_back(cache)
    return min(took)


async def test_a_healthy_client_does_not_notice_one_who_reads_much_at_a_time(tmp_path, record_property):
    """Thousands of reads wait for one connection: what can be sent is sent by one, and the others do not even wake."""
    with serve(tmp_path) as served:
        async with connect(served.url) as cache:
            await fill(cache, LARGE_PROMPT)
            await cache.flush()
            few, many = [await ping_seconds(served, cache, readers) for readers in (8, MANY_READERS)]
            record_property("with few and many", (few, many))
            assert many < 3 * few


async def test_half_open_connections_are_closed_in_time(tmp_path):
    with server(tmp_path, f"unix://{tmp_path}/s", "tcp://127.0.0.1:0", server_hello_timeout_seconds=0.5) as served:
        async with connect(served.url) as cache:
            await cache.ping()
            descriptors = served.descriptors()
            with ExitStack() as stack:
                peers = []
                for url in served.urls:
                    for half in (0, 1, 4, len(HELLO) - 1) * 4:
                        peers.append(peer := stack.enter_context(Peer(url, hello=False)))
                        peer.socket.sendall(HELLO[:half])
                async with connect(served.url) as other:
                    await other.ping()
                for peer in peers:
                    peer.socket.settimeout(60)
                    with suppress(ConnectionResetError):
                        assert peer.socket.recv(1) == b""
            await descriptors_given_back(served, cache, descriptors)


@pytest.mark.parametrize("kind", [0, 1], ids=["unix", "tcp"])
async def test_one_that_is_refused_before_it_says_hello_is_told_why(tmp_path, kind):
    with server(tmp_path, f"unix://{tmp_path}/s", "tcp://127.0.0.1:0", server_max_connections=1) as served:
        async with connect(served.url):
            with Peer(served.urls[kind], hello=False) as peer:
                closed = select.poll()
                closed.register(peer.socket, select.POLLRDHUP)
                assert closed.poll(10_000)
                peer.socket.setblocking(False)
                with pytest.raises(LimitError, match="1 connections, which is its limit"):
                    await greet(peer.socket, Hello(VERSION), None)


@pytest.mark.parametrize("kind", [0, 1], ids=["unix", "tcp"])
async def test_one_connection_too_many_is_told_so(tmp_path, kind):
    with server(tmp_path, f"unix://{tmp_path}/s", "tcp://127.0.0.1:0", server_max_connections=3) as served:
        url = served.urls[kind]
        async with connect(url), connect(url) as cache, connect(url):
            for _ in range(rounds(30, 1_000)):
                with pytest.raises(LimitError, match="3 connections, which is its limit"):
                    await connect(url, connect_timeout_seconds=60).open()
            await cache.ping()
        async with asyncio.timeout(60):
            while True:  # until the server has seen that the others have left
                with suppress(LimitError):
                    async with connect(url) as cache:
                        await cache.ping()
                    break


async def test_what_one_connection_asks_for_at_a_time_is_limited(tmp_path):
    """More than that is refused, each with an answer, and what was allowed goes on."""
    with server(tmp_path, server_max_requests=10) as served:
        async with connect(served.url) as cache, connect(served.url) as other:
            prompt = make_prompt(1, 9, BIG)
            await fill(cache, prompt)
            prefetches = [cache.prefetch(prompt) for _ in range(20)]
            done = [await settled(prefetch.load_done) for prefetch in prefetches]
            assert done == [1] * 10 + [LimitError] * 10
            assert await settled(other.prefetch(prompt).load_done) == 1
            await cache.end_request(prefetches[0].request_id)
            assert await settled(cache.prefetch(prompt).load_done) == 1


async def settled(future):
    try:
        return (await future).chunks
    except LimitError as error:
        return type(error)


async def test_large_answers_count_until_they_are_read(tmp_path):
    (tmp_path / "config.toml").write_text(f'{CONFIG}[server.tenants.bound.limits]\nunread_bytes = "512KiB"\n')
    url = f"unix://{tmp_path}/s"
    with server(tmp_path, url, config=tmp_path / "config.toml", result_ttl_seconds=60) as served:
        async with connect(served.url, token=TOKEN) as owner:
            await fill(owner, make_prompt(1000, layout=make_layout(ObjectGroup((1,), "uint8"), chunk_tokens=1)))
        with Peer(served.url, token=TOKEN) as peer:
            peer.send(*(messages.ListChunks(peer.number()) for _ in range(50)))
            async with connect(served.url, token=TOKEN) as other:

                async def all_are_answered():
                    return (await other.stats()).limits["waiting"].used <= 1

                await wait_until(all_are_answered)
                assert (await other.stats()).limits["unread_bytes"].used > 256 * 1024
            answers = await asyncio.to_thread(peer.answers, 50)
            listed = [answer for answer in answers if isinstance(answer, messages.ChunksListed)]
            refused = [answer for answer in answers if isinstance(answer, messages.Failed)]
            assert listed and refused and all(one.message.startswith("unread_bytes: ") for one in refused)
            peer.send(messages.ListChunks(peer.number()))
            assert type(peer.answers(1)[0]) is messages.ChunksListed, "those that were read do not count"


async def test_a_read_whose_answer_is_refused_was_not_entered(tmp_path):
    (tmp_path / "config.toml").write_text(f'{CONFIG}[server.tenants.bound.limits]\nunread_bytes = "16KiB"\n')
    prompt = make_prompt(4000, layout=make_layout(ObjectGroup((1,), "uint8"), chunk_tokens=1))
    with server(tmp_path, f"unix://{tmp_path}/s", config=tmp_path / "config.toml") as served:
        async with connect(served.url) as owner, connect(served.url, token=TOKEN) as client:
            await fill(owner, prompt)
            await client.prefetch(prompt, request_id="large").load_done
            for _ in range(2):
                with pytest.raises(LimitError, match="unread_bytes"):
                    await client.read("large")
            await client.end_request("large")
            stats = await owner.stats()
            assert (stats.requests, stats.leases) == (0, 0)


async def test_a_result_is_not_lost_with_an_answer_that_is_refused(tmp_path):
    (tmp_path / "config.toml").write_text(f'{CONFIG}[server.tenants.bound.limits]\nunread_bytes = "4KiB"\n')
    layout = make_layout(ObjectGroup((1,), "uint8"))
    parts = [make_prompt(1, number, layout) for number in range(256)]  # whose result is longer than that
    with server(tmp_path, f"unix://{tmp_path}/s", config=tmp_path / "config.toml") as served:
        async with connect(served.url, token=TOKEN) as client:
            for part in parts:
                await fill(client, part)
            await client.prefetch_segments(parts, request_id="long").load_done
            assert (await client.query_status("long")).chunks == 256
            await client.end_request("long")
