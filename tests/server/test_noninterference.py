"""What a tenant learns of another: nothing. One does the same in two worlds, in which the other does other things.

Whatever the one is told, by explanations, lookups, events, lists and HTTP, has to be the same in both. How fast storage
is (`expected_load_seconds`) and how full all of it is are of all: the worlds have room for everything.
"""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
import pytest
from contract.served import ServedCache, closed_at_the_end
from contract.support import CHUNK_TOKENS, LAYOUT, OBJECT_BYTES, fill, make_layout, settle
from soak import rounds

from async_cache import AsyncCache, AsyncCacheError, CacheConfig, ServerConfig
from async_cache.l2.memory import MemoryBackend
from async_cache.metrics import Watch
from async_cache.prompt.layout import Prompt, TokenSource
from async_cache.server import Server
from async_cache.server.access import Tenant, tenant_of
from async_cache.server.http.site import Site
from async_cache.testing.virtual import run_virtual

TOKENS = {"red": "token-of-red-number-one", "blue": "token-of-blue-number-one"}
CONFIG = ServerConfig(
    tenants={name: {"tokens": [token], "salts": [name]} for name, token in TOKENS.items()}  # type: ignore[misc]
)
LAYOUTS = (LAYOUT, make_layout(revision="r2"), make_layout(world_size=2))
STEPS = 12
MOST_BETWEEN = 4
"""Of the other, between two steps of the one."""


class World:
    """A cache with two tenants, of which one writes down all that it is told."""

    def __init__(self, cache: AsyncCache, red: ServedCache, blue: ServedCache, engine: ServedCache, site: Site):
        self.cache, self.red, self.blue, self.engine, self.site = cache, red, blue, engine, site
        self.told: list[Any] = []
        self.events = blue.events()

    async def do(self, who: str, verb: str, prompt: Prompt) -> None:
        """One step of a tenant; the one notes what it is answered."""
        try:
            answer = await getattr(self, f"_{verb}")(getattr(self, who), prompt)
        except AsyncCacheError as error:
            answer = repr(error)
        await settle()
        if who == "blue":
            self.told.append((verb, answer, self.events.take(10_000)))

    async def _store(self, client: ServedCache, prompt: Prompt) -> None:
        await fill(client, prompt)

    async def _store_half(self, client: ServedCache, prompt: Prompt) -> None:
        await fill(client, prompt, chunks=range(len(prompt) // 2))

    async def _write(self, client: ServedCache, prompt: Prompt) -> int:
        """Leave a writer open."""
        return len(await client.store(prompt))

    async def _hold(self, client: ServedCache, prompt: Prompt) -> Any:
        """Load, and leave the leases where they are."""
        prefetch = client.prefetch(prompt, request_id="the same for both")
        return plain(await prefetch.lookup_done), plain(await prefetch.load_done)

    async def _load(self, client: ServedCache, prompt: Prompt) -> Any:
        prefetch = client.prefetch(prompt)
        answer = plain(await prefetch.lookup_done), plain(await prefetch.load_done)
        await client.end_request(prefetch.request_id)
        return answer

    async def _end(self, client: ServedCache, prompt: Prompt) -> None:
        await client.end_request("the same for both")

    async def _query(self, client: ServedCache, prompt: Prompt) -> Any:
        return plain(await client.query_lookup_hits("the same for both"))

    async def _lookup(self, client: ServedCache, prompt: Prompt) -> Any:
        return plain(await client.lookup(prompt))

    async def _explain(self, client: ServedCache, prompt: Prompt) -> Any:
        return await client.explain(prompt)

    async def _delete(self, client: ServedCache, prompt: Prompt) -> Any:
        return await client.delete(prompt)

    async def _stats(self, client: ServedCache, prompt: Prompt) -> Any:
        return msgspec.structs.replace(await client.stats(), hold=None)  # how busy the loop is, all see

    async def _flush(self, client: ServedCache, prompt: Prompt) -> Any:
        return await client.flush()

    async def _list(self, client: ServedCache, prompt: Prompt) -> Any:
        return await client.roots(), await client.chunks()

    async def _list_backend(self, client: ServedCache, prompt: Prompt) -> Any:
        return await client.chunks(backend="near")

    async def _ask_of_the_other(self, client: ServedCache, prompt: Prompt) -> Any:
        """A prompt of a salt that is not the client's."""
        other, tokens = "red" if prompt.salt == "blue" else "blue", tokens_of(prompt)
        question = {"tokens": tokens, "salt": other, "adapter": prompt.adapter, "model": prompt.layout.model}
        by_http = await asked(self.site, "POST", "/explain", TOKENS[prompt.salt], question)
        try:
            return by_http, await client.explain(prompt.layout.prompt(tokens, salt=other, adapter=prompt.adapter))
        except AsyncCacheError as error:
            return by_http, repr(error)

    async def _http(self, client: ServedCache, prompt: Prompt) -> Any:
        question = {"tokens": tokens_of(prompt), "salt": prompt.salt, "adapter": prompt.adapter}
        fields = {name: getattr(prompt.layout, name) for name in ("model", "revision", "chunk_tokens", "world_size")}
        layout = fields | {"groups": [{"shape": [OBJECT_BYTES], "dtype": "uint8"}]}
        token = TOKENS[prompt.salt]
        return [
            await asked(self.site, "POST", "/explain", token, question | {"layout": layout}),
            await asked(self.site, "POST", "/explain", token, question | {"model": prompt.layout.model}),
            *[
                await asked(self.site, "GET", path, token)
                for path in ("/metrics", "/status", "/healthz", "/readyz", "/")
            ],
        ]


VERBS = [name.removeprefix("_") for name in vars(World) if name.startswith("_") and not name.startswith("__")]


def plain(value: Any) -> dict[str, Any]:
    """By name, without how long it takes, and the id that the client has made up."""
    names = set(value.__struct_fields__) - {"seconds", "expected_load_seconds", "request_id"}
    return {name: getattr(value, name) for name in names}


def tokens_of(prompt: Prompt) -> list[int]:
    assert isinstance(prompt.source, TokenSource)
    return list(memoryview(prompt.source.packed).cast("I"))


async def asked(site: Site, method: str, path: str, token: str, body: Any = None) -> tuple[int, Any]:
    """What the site answers."""
    sent: list[dict[str, Any]] = []
    data = json.dumps(body).encode()
    headers = [(b"host", b"localhost"), (b"authorization", f"Bearer {token}".encode())]
    headers += [(b"content-type", b"application/json")] if method == "POST" else []
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers}
    scope |= {"server": ("localhost", 80), "scheme": "http", "root_path": ""}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await site.app(scope, receive, send)  # type: ignore[arg-type]
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        config = CacheConfig(l1_bytes=2**24, explain_chunks=4096)
        cache = await stack.enter_async_context(AsyncCache(config, [MemoryBackend("near")]))
        server = await stack.enter_async_context(closed_at_the_end(Server(cache, CONFIG)))
        watch = Watch(cache.core, tenant_of)
        watch.open()
        stack.push_async_callback(watch.close)
        clients = [
            await stack.enter_async_context(ServedCache(cache, server, kind, tenant))
            for kind, tenant in (
                ("framed", Tenant("red", frozenset(["red"]))),
                ("framed", Tenant("blue", frozenset(["blue"]))),
                ("mapped", Tenant("engine")),
            )
        ]
        yield World(cache, *clients, Site(server, watch))


def steps(chance: random.Random, salt: str) -> Iterator[tuple[str, Prompt]]:
    """What a tenant does: prompts of few different chunks, so that both have the same tokens, layouts and adapters."""
    while True:
        tokens = [n for _ in range(chance.randrange(1, 5)) for n in [chance.randrange(2)] * CHUNK_TOKENS]
        layout, adapter = chance.choice(LAYOUTS), chance.choice(["", "lora"])
        yield chance.choice(VERBS), layout.prompt(tokens, salt=salt, adapter=adapter)


async def told_beside(seed: int, other: int | None) -> list[Any]:
    """What a tenant is told, whose steps are those of `seed`, beside one with the steps of `other`, or none."""
    chance = random.Random(seed)
    mine, theirs, between = steps(chance, "blue"), steps(random.Random(other), "red"), random.Random(other)
    async with world() as here:
        for number in range(STEPS):
            for _ in range(between.randrange(MOST_BETWEEN) if other is not None else 0):
                await here.do("red", *next(theirs))
            if number % 4 == 3:
                await here.engine.flush()
                await here.engine.clear("l1")
                await settle()
            await asyncio.sleep(number + 1 - asyncio.get_running_loop().time())  # at the same moment in all worlds
            await here.do("blue", *next(mine))
        return here.told


@pytest.mark.timeout(3600)
def test_a_tenant_is_told_the_same_whatever_another_does() -> None:
    for seed in range(rounds(25, 1000)):
        alone = run_virtual(told_beside(seed, None))
        assert len(alone) == STEPS
        for other in (2 * seed + 1, 2 * seed + 2):
            assert run_virtual(told_beside(seed, -other)) == alone, f"seed {seed}, beside {other}"
