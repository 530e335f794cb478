"""What is kept and warmed over HTTP and the wire: for each tenant, over restarts, and by servers of any age."""

import asyncio
import signal
import time
from pathlib import Path

import pytest
from contract.served import serve
from contract.support import CHUNK_TOKENS, fill, make_prompt, make_tokens

from async_cache import AccessDeniedError, CacheConfig, ServiceError, connect
from async_cache.client.blocking import BlockingClient
from async_cache.client.link import Link
from async_cache.protocol import messages

from .http import BOUND_TOKEN, TENANTS, TOKEN, web
from .programs import server

LAYOUT = {"model": "model", "groups": [{"shape": [16], "dtype": "uint8"}], "chunk_tokens": 4}
QUESTION = {"tokens": make_tokens(3), "layout": LAYOUT}


async def store(url: str, **options: str) -> None:
    async with connect(url, token=options.pop("token", None)) as cache:
        await fill(cache, make_prompt(3, **options))
        await cache.flush()


def test_over_http_it_is_kept_listed_and_warmed(tmp_path: Path) -> None:
    with web(tmp_path) as site:
        asyncio.run(store(site.served.url))
        code, kept = site.post("/retain", QUESTION | {"ttl_seconds": 3600, "keep_tokens": 8})
        assert (code, kept["chunks"], kept["clipped"]) == (200, 2, None)
        code, [listed] = site.json("/retained")
        assert (code, listed["chunks"], listed["model"]) == (200, 2, "model")
        code, begun = site.post("/warm", QUESTION)
        assert code == 202
        until = time.monotonic() + 60
        while (told := site.json(f"/warm/{begun['name']}")[1])["state"] != "loaded" and time.monotonic() < until:
            pass
        assert (told["result"]["chunks"], told["hits"]["chunks"], told["result"]["request_id"]) == (3, 3, "")
        assert site.json("/warm/unknown")[0] == 404
        assert site.json("/status")[1]["stats"]["leases"] == 0
        for bad in ({"ttl_seconds": -1}, {"keep_tokens": 99}, {"ttl_seconds": "x"}, {"more": 1}):
            assert site.post("/retain", QUESTION | bad)[0] == 400
        assert site.post("/retain", QUESTION | {"ttl_seconds": 0})[1]["chunks"] == 0
        assert site.json("/retained") == (200, [])


def test_a_tenant_keeps_and_sees_what_is_its_own(tmp_path: Path) -> None:
    config = tmp_path / "cache.toml"
    config.write_text(TENANTS)
    with web(tmp_path, config=config) as site:
        url = site.served.url
        asyncio.run(store(url, salt="acme", token=BOUND_TOKEN))
        asyncio.run(store(url, token=TOKEN))
        own = QUESTION | {"salt": "acme"}
        assert site.post("/retain", own)[0] == 401
        assert site.post("/retain", QUESTION, BOUND_TOKEN)[0] == 403
        assert site.post("/warm", QUESTION, BOUND_TOKEN)[0] == 403
        assert site.post("/retain", own, BOUND_TOKEN)[1]["chunks"] == 3
        assert site.post("/retain", QUESTION, TOKEN)[1]["chunks"] == 3
        begun = site.post("/warm", own, BOUND_TOKEN)[1]
        assert site.json(f"/warm/{begun['name']}", TOKEN)[0] == 404
        assert [it["salt"] for it in site.json("/retained", BOUND_TOKEN)[1]] == ["acme"]
        assert len(site.json("/retained", TOKEN)[1]) == 2
        with BlockingClient(url, token=BOUND_TOKEN) as client:
            assert [kept.salt for kept in client.retained()] == ["acme"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_is_started_anew_keeps_what_was_retained(tmp_path: Path, how: signal.Signals) -> None:
    store_url = f"fs://{tmp_path}/store?capacity=64KiB"
    with server(tmp_path, l2=[store_url]) as first:
        with BlockingClient(first.url) as client:
            for number in range(2):
                prompt = make_prompt(3, number)
                with client.store(prompt) as writer:
                    for chunk in writer:
                        chunk.commit()
                client.flush()
                assert client.retain(prompt, ttl_seconds=3600).chunks == 3
            client.hint(make_prompt(3, 0), output_tokens=7, returns=False)
            assert client.warm(make_prompt(3, 0)).chunks == 3
            client.retain(make_prompt(3, 1), ttl_seconds=0)
        first.stop(how)
    with server(tmp_path, l2=[store_url]) as second, BlockingClient(second.url) as client:
        [kept] = client.retained()
        assert kept.chunks == 3 and 3000 < kept.expires_in_seconds <= 3600
        for number in range(100, 130):
            with client.store(make_prompt(4, number)) as writer:
                for chunk in writer:
                    chunk.commit()
            client.flush()
        client.clear("l1")
        assert client.lookup(make_prompt(3, 0)).chunks == 3


async def test_a_server_that_does_not_know_it_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client of today, and a server whose greeting says nothing of what came later."""
    made = Link.__init__

    def older(self: Link, welcome: messages.Welcome, *rest: object) -> None:
        made(self, messages.Welcome(*[getattr(welcome, name) for name in welcome.__struct_fields__[:5]]), *rest)

    monkeypatch.setattr(Link, "__init__", older)
    async with serve(CacheConfig(l1_bytes=2**16, l2=[]), [], "framed") as client:
        prompt = make_prompt(2)
        await fill(client, prompt)
        for call in (client.retain(prompt), client.warm(prompt), client.hint(prompt), client.retained()):
            with pytest.raises(ServiceError, match="older than this client"):
                await call
        assert (await client.lookup(prompt)).chunks == 2


def test_a_tenant_deletes_a_model_of_its_own_salts_and_of_nobody_elses(tmp_path: Path) -> None:
    config = tmp_path / "cache.toml"
    config.write_text(TENANTS)
    with web(tmp_path, config=config) as site:
        url = site.served.url
        asyncio.run(store(url, salt="acme", token=BOUND_TOKEN))
        asyncio.run(store(url, token=TOKEN))
        asyncio.run(store(url, salt="acme", adapter="lora", token=BOUND_TOKEN))
        model = {"model": "model"}
        assert site.post("/delete_model", model)[0] == 401
        assert site.post("/delete_model", model | {"salt": ""}, BOUND_TOKEN)[0] == 403
        for bad in ({}, {"model": ""}, model | {"tokens": [1]}, {"model": 3}):
            assert site.post("/delete_model", bad, BOUND_TOKEN)[0] == 400
        code, told = site.post("/delete_model", model | {"adapter": "lora"}, BOUND_TOKEN)
        assert (code, told["state"], told["chunks"], told["unsure"]) == (200, "deleted", 3, [])
        with BlockingClient(url, token=BOUND_TOKEN) as acme, BlockingClient(url, token=TOKEN) as operations:
            assert acme.delete_model("model").chunks == 3
            assert acme.lookup(make_prompt(3, salt="acme")).chunks == 0
            assert operations.lookup(make_prompt(3)).chunks == 3
            with pytest.raises(AccessDeniedError):
                acme.delete_model("model", salt="")
            with pytest.raises(ValueError, match="model"):
                acme.delete_model("")


def test_after_a_kill_quotas_hold_for_what_is_found_again(tmp_path: Path) -> None:
    store_url = f"fs://{tmp_path}/store"
    with server(tmp_path, l2=[store_url]) as first:
        for number in range(4):
            asyncio.run(store(first.url, salt="acme", number=number))
        first.kill()
    with server(tmp_path, l2=[store_url], quotas="acme?l2=64B") as second, BlockingClient(second.url) as client:
        asyncio.run(store(second.url, salt="acme", number=9))
        left = sum(client.lookup(make_prompt(3, number, salt="acme")).l2_chunks for number in (0, 1, 2, 3, 9))
        assert left <= 4
        assert client.delete_model("model", salt="acme").chunks == 4


def test_what_is_warmed_counts_as_a_request_of_its_tenant(tmp_path: Path) -> None:
    config = tmp_path / "cache.toml"
    config.write_text(TENANTS)
    with web(tmp_path, config=config) as site:

        async def use() -> None:
            async with connect(site.served.url, token=BOUND_TOKEN) as cache:
                prompt = make_prompt(3, salt="acme")
                await fill(cache, prompt)
                assert (await cache.warm(prompt)).chunks == 3

        asyncio.run(use())
        assert site.post("/warm", QUESTION, TOKEN)[0] == 202
        until = time.monotonic() + 60
        while len(told := site.json("/status", TOKEN)[1]["tokens"]) < 2 and time.monotonic() < until:
            pass
        assert {row["tenant"]: row["l1_hits"] // CHUNK_TOKENS for row in told} == {"acme": 3, "operations": 0}
