"""One tenant asks for as much as a few valid kilobytes can ask for: another's messages do not wait for it.

What is counted is how much of the one's was answered before the other's were, all in one loop: on a busy machine time
says nothing, and who of two processes is ahead neither.
"""

import asyncio
from contextlib import asynccontextmanager

import pytest
from contract.served import ServedCache, closed_at_the_end
from contract.support import make_layout

from async_cache import AsyncCache, CacheConfig, ObjectGroup
from async_cache.config import ServerConfig
from async_cache.l2.filesystem import FileSystemBackend
from async_cache.l2.memory import MemoryBackend
from async_cache.prompt.layout import ModelLayout
from async_cache.protocol import messages
from async_cache.protocol.frames import frame
from async_cache.server import Server
from async_cache.server.access import Tenant

from .programs import server
from .support import Peer

RED = "token-of-red_____________"
CONFIG = f"""
[server.tenants.red]
tokens = ["{RED}"]
salts = ["red"]
"""
MESSAGES, PINGS = 64, 20
OBJECTS = 2**18
BIG = ModelLayout("big", tuple(ObjectGroup((1,), "uint8") for _ in range(4096)), chunk_tokens=1)
WINDOWS = ModelLayout(
    "windows", tuple(ObjectGroup((1,), "uint8", window_chunks=n + 1) for n in range(4096)), chunk_tokens=1
)
SMALL = make_layout(ObjectGroup((64,), "uint8"))
ATTACKS = {
    "lookups": lambda red, prompt: red.lookup(prompt),
    "prefetches": lambda red, prompt: red.prefetch(prompt).load_done,
    "deletions": lambda red, prompt: red.delete(prompt),
}


@asynccontextmanager
async def two_tenants(backend):
    async with (
        AsyncCache(CacheConfig(l1_bytes=2**20), [backend]) as cache,
        closed_at_the_end(Server(cache, ServerConfig(max_message_objects=OBJECTS))) as server,
        ServedCache(cache, server, "framed", Tenant("red", frozenset({"red"}))) as red,
        ServedCache(cache, server, "framed", Tenant("blue", frozenset({"blue"}))) as blue,
    ):
        yield red, blue


@pytest.mark.parametrize("layout", [BIG, WINDOWS], ids=lambda layout: layout.model)
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("store", ["memory", "fs"])
async def test_what_one_tenant_asks_in_one_piece_does_not_hold_up_another(tmp_path, store, attack, layout):
    chunks = OBJECTS // len(layout.groups)
    prompts = [layout.prompt(range(n * chunks, (n + 1) * chunks), salt="red") for n in range(MESSAGES)]
    async with two_tenants(MemoryBackend() if store == "memory" else FileSystemBackend(tmp_path)) as (red, blue):
        await red.lookup(layout.prompt(range(1), salt="red"))  # which registers the layout
        asked = [asyncio.ensure_future(ATTACKS[attack](red, prompt)) for prompt in prompts]
        for n in range(PINGS):
            await blue.ping()
            prefetch = blue.prefetch(SMALL.prompt(range(16 * SMALL.chunk_tokens), salt="blue"), request_id=f"b{n}")
            assert (await prefetch.load_done).chunks == 0
            await blue.end_request(prefetch.request_id)
        assert sum(map(asyncio.Future.done, asked)) < MESSAGES // 4, "the other waited for most of it"
        for call in asked:
            call.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    directory = tmp_path_factory.mktemp("freezing")
    (directory / "c.toml").write_text(CONFIG)
    with server(directory, config=directory / "c.toml", server_max_message_objects=OBJECTS) as served:
        yield served


def test_a_layout_that_takes_long_to_read_is_refused_before_it_is_read(served):
    group = ["Group", [1], "uint8", None, [0] * 4096]
    payload = messages.encode(["RegisterLayout", 1, 0, ["Layout", "x", [group] * 4000, 1, 1, 1, ""]])
    with Peer(served.url, token=RED) as red:
        red.socket.sendall(frame(payload))
        (refused,) = red.answers(1)
        assert refused.code == "protocol" and "262144 bytes" in refused.message


def test_more_objects_than_a_message_may_have_are_refused_before_anything_is_made_of_them(served):
    with Peer(served.url, token=RED) as red:
        red.register(BIG)
        red.answers(1)
        wire = messages.EngineDigests(0, "red", "", [b"12345678"] * 65)
        red.send(messages.Lookup(5, wire))
        (refused,) = red.answers(1)
        assert refused.code == "limit", "they are there twice, too, which only shows when they are looked at"
