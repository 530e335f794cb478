"""Engines and tenants that share a server do not meet."""

import asyncio

import pytest
from contract.support import LAYOUT, count_hits, fill, make_layout, make_prompt, pattern, verify
from soak import rounds

from async_cache import AccessDeniedError, ObjectGroup, UnknownRequestError, connect
from async_cache.protocol import messages
from async_cache.protocol.messages import Failed
from async_cache.protocol.prompts import pack

from .programs import server
from .support import MIB, Peer, given_back

RED, BLUE, ENGINE, OTHER_ENGINE = (f"token-of-{name:_<16}" for name in ("red", "blue", "engine", "other"))
CONFIG = f"""
[server.tenants.red]
tokens = ["{RED}", "second-{RED}"]
salts = ["red", "shared"]

[server.tenants.blue]
tokens = ["{BLUE}"]
salts = ["blue", "shared"]

[server.tenants.engine]
tokens = ["{ENGINE}"]

[server.tenants.other]
tokens = ["{OTHER_ENGINE}"]
"""
CHUNKS = 3
LARGE = make_layout(ObjectGroup((2 * MIB + 5,), "uint8"), ObjectGroup((33,), "uint8"))
UNIX, TCP = 0, 1


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tenants")
    (directory / "config.toml").write_text(CONFIG)
    urls = f"unix://{directory}/s", "tcp://127.0.0.1:0"
    with server(directory, *urls, l2=[f"fs://{directory}/l2"], config=directory / "config.toml") as served:
        yield served


async def use(cache, name, prompt):
    """Go the whole way with one request id, again and again, and always get one's own bytes."""
    await fill(cache, prompt)
    for number in range(rounds(50, 2_000)):
        prefetch = cache.prefetch(prompt, request_id="same")
        hits, result = await asyncio.gather(cache.query_lookup_hits("same"), cache.query_status("same"))
        assert (hits.chunks, result.chunks) == (len(prompt), len(prompt)), name
        assert prefetch.request_id == hits.request_id == result.request_id == "same"
        if number % 2:
            async with cache.read("same") as lease:
                assert len(verify(lease, prompt)) == len(prompt)
        else:
            await cache.end_request("same")
    await cache.ping()


MANY = {
    "namespaces": [{"namespace": "one"}, {"namespace": "two"}, {}],
    "tenants": [{"token": ENGINE}, {"token": OTHER_ENGINE}, {"token": RED}, {"token": BLUE}, {}],
    "both": [{"token": t, "namespace": n} for t in (ENGINE, OTHER_ENGINE) for n in ("engine", "other", "")],
}


@pytest.mark.parametrize("kind", MANY)
async def test_those_who_use_the_same_request_ids_never_meet(served, kind):
    async with asyncio.TaskGroup() as tasks, connect(served.url) as watcher:
        clients = [await connect(served.url, **options).open() for options in MANY[kind]]
        running = [
            tasks.create_task(use(cache, options, make_prompt(CHUNKS, number + 10, salt=salt_of(options))))
            for number, (cache, options) in enumerate(zip(clients, MANY[kind], strict=True))
        ]
        await asyncio.wait(running)
        await given_back(watcher)
        for cache in clients:
            await cache.close()


def salt_of(options):
    return {RED: "red", BLUE: "blue"}.get(options.get("token"), "")


@pytest.mark.parametrize("kind", MANY)
async def test_a_request_of_others_is_unknown(served, kind):
    first, *others = MANY[kind]
    prompt = make_prompt(CHUNKS, 20)
    async with connect(served.url, **first) as owner:
        await fill(owner, prompt)
        await owner.prefetch(prompt, request_id="mine").load_done
        for options in others:
            async with connect(served.url, **options) as other:
                for call in (other.query_lookup_hits, other.query_status, other.renew, other.read):
                    with pytest.raises(UnknownRequestError) as told:
                        await call("mine")
                    assert "\0" not in str(told.value) and "'mine'" in str(told.value)
                await other.end_request("mine")
        assert (await owner.query_status("mine")).chunks == CHUNKS
        await owner.end_request("mine")


async def test_a_client_of_the_same_namespace_is_no_stranger(served):
    prompt = make_prompt(CHUNKS, 21)
    async with (
        connect(served.urls[TCP], "ns", token=ENGINE) as one,
        connect(served.url, "ns", token=ENGINE) as two,
    ):
        await fill(one, prompt)
        await one.prefetch(prompt, request_id="ours").load_done
        async with two.read("ours") as lease:
            assert verify(lease, prompt) == list(range(CHUNKS))


@pytest.mark.parametrize("namespace", ["a\0b", "\0", "engine\0", "x" * 129])
def test_a_namespace_can_not_be_made_to_look_like_another(served, namespace):
    with pytest.raises(ValueError, match="namespace"):
        connect(served.url, namespace)


@pytest.mark.parametrize("token", [None, "x" * 20, "", RED[:-1], f"{RED} "])
async def test_a_port_wants_a_token_that_is_known(served, token):
    with pytest.raises(AccessDeniedError, match="token"):
        await connect(served.urls[TCP], token=token).open()
    if token is not None:
        with pytest.raises(AccessDeniedError, match="token"):
            await connect(served.url, token=token).open()


DENIED = {
    "lookup": lambda cache, prompt: cache.lookup(prompt),
    "prefetch": lambda cache, prompt: cache.prefetch(prompt).lookup_done,
    "load": lambda cache, prompt: cache.prefetch(prompt).load_done,
    "store": lambda cache, prompt: fill(cache, prompt),
    "delete": lambda cache, prompt: cache.delete(prompt),
    "clear l1": lambda cache, prompt: cache.clear("l1"),
    "prefetch of parts": lambda cache, prompt: cache.prefetch_segments([prompt]).lookup_done,
    "lookup of parts": lambda cache, prompt: cache.lookup_segments([prompt]),
    "clear all": lambda cache, prompt: cache.clear("all"),
    "add a backend": lambda cache, prompt: cache.add_backend("memory://x"),
    "drain a backend": lambda cache, prompt: cache.drain_backend("x"),
    "remove a backend": lambda cache, prompt: cache.remove_backend("x"),
    "list backends": lambda cache, prompt: cache.backends(),
}


@pytest.mark.parametrize("where", [UNIX, TCP], ids=["unix", "tcp"])
@pytest.mark.parametrize("call", DENIED)
@pytest.mark.parametrize("salt", ["", "blue", "RED", "red "])
async def test_a_token_that_is_bound_to_salts_is_for_no_other(served, where, call, salt):
    prompt = make_prompt(CHUNKS, 30, salt=salt)
    async with connect(served.url) as owner, connect(served.urls[where], token=RED) as bound:
        await fill(owner, prompt)
        with pytest.raises(AccessDeniedError, match="the token is"):
            await DENIED[call](bound, prompt)
        assert await count_hits(owner, prompt) == CHUNKS
        await given_back(owner)


@pytest.mark.parametrize("where", [UNIX, TCP], ids=["unix", "tcp"])
@pytest.mark.parametrize("layout", [LAYOUT, LARGE], ids=["small", "large"])
async def test_a_bound_token_reads_the_right_bytes_in_frames(served, where, layout):
    prompt = make_prompt(CHUNKS, 40, layout, salt="red")
    async with connect(served.url) as engine, connect(served.urls[where], token=RED) as bound:
        await fill(bound, prompt)
        for round_ in range(2):
            prefetch = bound.prefetch(prompt)
            assert (await prefetch.load_done).chunks == CHUNKS
            async with bound.read(prefetch.request_id) as lease:
                assert verify(lease, prompt) == list(range(CHUNKS))
            if not round_:
                await bound.flush()
                await engine.clear("l1")
        with pytest.raises(AccessDeniedError, match="does not see the server's memory"):
            bound.memory  # noqa: B018
        with pytest.raises(ValueError, match="rank"):
            await bound.store(prompt, rank=1)
        assert (await bound.delete(prompt)).chunks == CHUNKS
        assert await count_hits(engine, prompt) == 0


async def test_a_server_hashes_the_segments_of_a_bound_token_itself_with_their_context(served):
    tokens, context = list(range(500, 513)), [1, 2, 3]
    own, foreign = (LAYOUT.segment(tokens, context=context, salt=salt) for salt in ("red", "blue"))
    async with connect(served.url) as engine, connect(served.url, token=RED) as bound:
        await fill(bound, own)
        assert await count_hits(engine, own) == len(own) == 3  # which was found by its digests
        assert await count_hits(bound, LAYOUT.segment(tokens, context=[1, 2], salt="red")) == 0
        assert await count_hits(bound, LAYOUT.prompt(tokens, salt="red")) == await count_hits(engine, foreign) == 0
        for client in (bound, engine):
            prefetch = client.prefetch_segments([own, LAYOUT.prompt(tokens, salt="red")], request_id="parts")
            result = await prefetch.load_done
            assert [part.chunks for part in result.parts] == [3, 0]
            assert {part.request_id for part in (result, *result.parts)} == {"parts"}
            assert [part.base_tokens for part in result.parts] == [3, 0]
            async with client.read("parts") as lease:
                assert verify(lease, own) == [0, 1, 2]
        with pytest.raises(AccessDeniedError):
            await bound.prefetch_segments([foreign]).lookup_done
        await given_back(engine)


async def test_salts_keep_the_same_tokens_apart_and_a_shared_one_does_not(served):
    async with (
        connect(served.url, token=RED) as red,
        connect(served.url, token=BLUE) as blue,
        connect(served.url) as engine,
    ):
        await fill(red, make_prompt(CHUNKS, 50, salt="red"))
        await fill(red, make_prompt(CHUNKS, 50, salt="shared"))
        assert await count_hits(blue, make_prompt(CHUNKS, 50, salt="blue")) == 0
        assert await count_hits(blue, make_prompt(CHUNKS, 50, salt="shared")) == CHUNKS
        assert (await blue.delete(make_prompt(CHUNKS, 50, salt="blue"))).chunks == 0
        assert await count_hits(engine, make_prompt(CHUNKS, 50, salt="red")) == CHUNKS


@pytest.mark.parametrize("where", [UNIX, TCP], ids=["unix", "tcp"])
async def test_a_bound_token_gets_no_map_and_can_name_no_digests(served, where):
    """Neither its own, nor those of others, of which it may have heard."""
    prompts = [make_prompt(CHUNKS, 60), make_prompt(CHUNKS, 60, salt="red")]
    async with connect(served.url) as engine:
        for prompt in prompts:
            await fill(engine, prompt)
        with Peer(served.urls[where], token=RED) as peer:
            assert (peer.welcome.mapped, peer.welcome.trusted, peer.arena_fd) == (False, False, None)
            peer.register(LAYOUT)
            peer.answers(1)
            for prompt in prompts:
                # The digests of one prompt, said to be of a salt that it may use.
                digests = pack(prompt, 0, trusted=True)
                claimed = messages.Digests(0, digests.root, digests.tokens, "red", digests.chunk_hashes)
                for number, message in enumerate(
                    [
                        messages.Lookup(peer.number(), claimed),
                        messages.Prefetch(peer.number(), claimed, "r"),
                        messages.ReserveStore(peer.number(), claimed),
                        messages.Delete(peer.number(), claimed),
                    ]
                ):
                    peer.send(message)
                    (failed,) = peer.answers(1)
                    assert isinstance(failed, Failed) and failed.code == "access_denied", number
            assert await count_hits(engine, prompts[0]) == CHUNKS
        await given_back(engine)


async def test_over_a_port_even_a_trusted_token_gets_its_bytes_in_frames(served):
    prompt = make_prompt(CHUNKS, 70, LARGE)
    with Peer(served.urls[TCP], token=ENGINE) as peer:
        assert (peer.welcome.mapped, peer.welcome.trusted) == (False, True)
    async with connect(served.urls[TCP], token=ENGINE) as cache:
        await fill(cache, prompt)
        prefetch = cache.prefetch(prompt)
        async with cache.read(prefetch.request_id) as lease:
            assert verify(lease, prompt) == list(range(CHUNKS))
        with pytest.raises(AccessDeniedError):
            cache.memory  # noqa: B018


async def test_what_a_bound_writer_sends_is_what_is_cached(served):
    """Its bytes lie in a segment over a Unix socket, and travel in frames over a port."""
    for where in (UNIX, TCP):
        prompt = make_prompt(2, 80 + where, LARGE, salt="red")
        async with connect(served.urls[where], token=RED) as bound, connect(served.url) as engine:
            await fill(bound, prompt)
            prefetch = engine.prefetch(prompt)
            async with engine.read(prefetch.request_id) as lease:
                assert [bytes(chunk.views[1]) for chunk in lease] == [pattern(prompt, n, group=1) for n in range(2)]
                assert verify(lease, prompt) == [0, 1]
