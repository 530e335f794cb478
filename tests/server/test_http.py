"""HTTP beside the server: what it says, to whom, and that the server needs it for nothing."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import uvloop
from contract.support import fill, make_layout, make_prompt, make_tokens
from prometheus_client.parser import text_string_to_metric_families

from async_cache import AsyncCache, CacheConfig, ConfigError, ServerConfig, connect
from async_cache.config import http_address
from async_cache.l2.memory import MemoryBackend
from async_cache.metrics import Watch
from async_cache.server import Server
from async_cache.server.access import tenant_of
from async_cache.server.http import serving
from async_cache.server.http.health import Problem, problems
from async_cache.server.http.serving import HTTPServer
from async_cache.testing.backends import GatedBackend
from async_cache.testing.virtual import run_virtual

from .http import BOUND_TOKEN, TENANTS, TOKEN, ServedWeb, Web, web
from .programs import server
from .support import wait_until

WATCHED = ["/metrics", "/status"]
OPEN = ["/", "/healthz", "/readyz"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedWeb]:
    with web(tmp_path_factory.mktemp("http")) as served:
        yield served


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    """A server with tenants."""
    directory = tmp_path_factory.mktemp("guarded")
    config = directory / "cache.toml"
    config.write_text(TENANTS)
    with web(directory, config=config) as served:
        yield served


def samples(site: Web, token: str | None = None) -> dict[str, float]:
    code, headers, body = site.get("/metrics", token)
    assert code == 200 and headers["content-type"].startswith("text/plain; version=")
    return {
        sample.name + "".join(f" {value}" for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def test_a_server_that_is_well_says_so(site: Web) -> None:
    assert site.json("/healthz") == (200, {"status": "ok", "problems": []})
    assert site.json("/readyz") == (200, {"status": "ready"})


async def test_what_clients_do_is_counted_and_shown(site: ServedWeb) -> None:
    async with connect(site.served.url, namespace="engine") as cache:
        await fill(cache, make_prompt(3))
        await cache.prefetch(make_prompt(4), request_id="of an engine").load_done

        async def is_counted() -> bool:
            shown = await asyncio.to_thread(samples, site)
            return shown.get("async_cache_requests_total model ") == 1

        await wait_until(is_counted)
        shown = await asyncio.to_thread(samples, site)
        assert shown["async_cache_prefix_cache_queries_total model "] == 16
        assert shown["async_cache_prefix_cache_hits_total model  l1"] == 12
        assert shown["async_cache_connections"] == 1
        assert shown["async_cache_requests_held unclaimed"] == 1
        _, status = await asyncio.to_thread(site.json, "/status")
        assert [(it["request_id"], it["model"], it["l1_chunks"]) for it in status["recent"]] == [
            ("of an engine", "model", 3)
        ]
        assert status["stats"]["l1_chunks"] == 3 and status["connections"] == 1


def test_every_name_of_a_metric_is_ours_or_the_process(site: Web) -> None:
    assert {name.split("_")[0] for name in samples(site)} == {"async", "process"}


def test_the_page_is_one_file_that_needs_nothing_else(site: Web) -> None:
    code, headers, body = site.get("/")
    assert code == 200 and headers["content-type"].startswith("text/html")
    assert b"http://" not in body.replace(b"http://www.w3.org/", b"") and b"https://" not in body
    assert "default-src 'none'" in headers["content-security-policy"]


@pytest.mark.parametrize("path", ["/nothing", "/metrics/", "/status/x"])
def test_what_is_not_there_is_not_found(path: str, site: Web) -> None:
    assert site.get(path)[0] == 404


# Who is told.


@pytest.mark.parametrize("path", WATCHED)
@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:9600", "127.0.0.1.evil.example", "localhost.evil.example"]
)
def test_a_name_that_leads_here_for_a_browser_is_told_nothing(path: str, host: str, site: Web) -> None:
    assert site.get(path, host=host)[0] == 401


@pytest.mark.parametrize("host", ["localhost", "localhost:9600", "127.0.0.1", "[::1]:9600"])
def test_this_machine_is_told(host: str, site: Web) -> None:
    assert site.get("/status", host=host)[0] == 200


@pytest.mark.parametrize("path", WATCHED)
def test_with_tenants_only_those_who_may_see_all_are_told(path: str, guarded: Web) -> None:
    code, headers, _ = guarded.get(path)
    assert code == 401 and headers["www-authenticate"] == "Bearer"
    assert guarded.get(path, "token-of-nobody-at-all")[0] == 403
    code, _, body = guarded.get(path, BOUND_TOKEN)
    assert code == 403 and set(json.loads(body)) == {"error"}
    assert guarded.get(path, TOKEN)[0] == 200
    assert guarded.get(path, TOKEN, host="cache.example")[0] == 200, "who has a token is no stranger's page"


@pytest.mark.parametrize("path", OPEN)
def test_who_has_no_token_learns_whether_the_server_is_well_and_no_more(path: str, guarded: Web) -> None:
    code, _, body = guarded.get(path)
    assert code == 200
    assert b"acme" not in body and b"operations" not in body


def test_beyond_loopback_it_needs_tenants() -> None:
    for address in ("0.0.0.0:9600", "[::]:9600", "cache.example:9600"):
        with pytest.raises(ConfigError, match=r"^http: .* needs tenants"):
            ServerConfig(listen=("unix:///a",), http=address)
        ServerConfig(
            listen=("unix:///a",),
            http=address,
            tenants={"a": {"tokens": ["token-number-of-a"]}},  # type: ignore[dict-item]
        )


@pytest.mark.parametrize("text", ["9600", "localhost", "http://localhost:9600", "localhost:port", "unix:///a", 9600])
def test_an_address_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^http must be host:port"):
        ServerConfig(listen=("unix:///a",), http=text)


# Why.


async def test_why_a_prompt_is_not_cached_is_told(site: ServedWeb) -> None:
    layout = make_layout(model="explained")
    async with connect(site.served.url) as cache:
        await fill(cache, make_prompt(2, 5, layout))
    tokens = make_tokens(3, 5)
    text = ",".join(map(str, tokens))
    code, told = await asyncio.to_thread(site.json, f"/explain?model=explained&tokens={text}")
    assert code == 200
    assert [(span["state"], span["chunks"]) for span in told["spans"]] == [("l1", 2), ("unknown", 1)]
    described = {"model": "explained", "groups": [{"shape": [16], "dtype": "uint8"}], "chunk_tokens": 4}
    code, again = await asyncio.to_thread(site.post, "/explain", {"tokens": tokens, "layout": described})
    assert (code, again["spans"][0]) == (200, told["spans"][0])


@pytest.mark.parametrize(
    "question", [{}, {"tokens": "1"}, {"tokens": [1], "model": "none"}, {"tokens": [-1], "model": "model"}, {"x": 1}]
)
def test_a_question_that_is_none_is_told_so(question: dict[str, object], site: ServedWeb) -> None:
    code, told = site.post("/explain", question)
    assert code == 400 and set(told) == {"error"}
    assert site.json("/explain?tokens=x")[0] == 400


def test_a_question_that_is_too_long_is_refused(site: ServedWeb) -> None:
    assert site.post("/explain", {"tokens": [1], "model": "x" * 2**20})[0] == 400


def test_a_tenant_asks_of_its_own_salts_only(guarded: Web) -> None:
    described = {"model": "m", "groups": [{"shape": [16], "dtype": "uint8"}], "chunk_tokens": 4}
    question = {"tokens": [1, 2, 3, 4], "layout": described}
    assert guarded.post("/explain", question)[0] == 401
    assert guarded.post("/explain", question, BOUND_TOKEN)[0] == 403
    assert guarded.post("/explain", question | {"salt": "acme"}, BOUND_TOKEN)[0] == 200
    assert guarded.post("/explain", question | {"salt": "acme"}, TOKEN)[0] == 200


# The server goes on.


async def test_a_port_that_is_taken_is_a_line_in_the_log(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with server(tmp_path, server_http=address) as served:
            async with connect(served.url) as cache:
                await cache.ping()
            assert served.says(f"WARNING async_cache.server.http.serving: no HTTP: cannot listen at tcp://{address}")
            assert served.stop() == 0


async def test_a_server_ends_in_time_whoever_asks_slowly(tmp_path: Path) -> None:
    with web(tmp_path) as site:
        host, port = site.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as asks, socket.create_connection((host, int(port))):
            asks.sendall(b"GET /status HTTP/1.1\r\nHost: loc")
            await asyncio.to_thread(site.get, "/healthz")
            assert site.served.stop() == 0
    assert "ERROR" not in site.served.log


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /healthz HTTP/1.1\r\nHost: loc",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /heal",
        b"POST /explain HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{",
    ],
    ids=["nothing", "half a head", "half a second head", "half a body"],
)
async def test_who_does_not_send_a_request_to_its_end_is_let_go(
    sent: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "_REQUEST_SECONDS", 0.3)
    async with inside(tmp_path, GatedBackend(MemoryBackend())) as (_, site), asyncio.timeout(60):
        host, port = site.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(sent)
        with suppress(ConnectionResetError):
            answered = await reader.read()
            assert answered.count(b"200 OK") == sent.count(b"\r\n\r\nGET")
        writer.close()
        assert (await asyncio.to_thread(site.json, "/healthz"))[0] == 200


async def test_an_explanation_that_takes_too_long_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("async_cache.server.http.site._EXPLAIN_SECONDS", 0.05)
    backend = GatedBackend(MemoryBackend(), "lookup")
    async with inside(tmp_path, backend) as (cache, site):
        await fill(cache, make_prompt(1))
        question = "/explain?tokens=" + ",".join(map(str, range(8)))
        code, told = await asyncio.to_thread(site.json, question)
        assert (code, "ask for a part" in told["error"]) == (503, True)
        await cache.close()
        backend.release()
        assert (await asyncio.to_thread(site.json, question))[0] == 503


def test_no_http_is_no_http(tmp_path: Path) -> None:
    with server(tmp_path, server_http="") as served:
        assert "HTTP" not in served.log


# What is wrong.


@asynccontextmanager
async def inside(directory: Path, backend: GatedBackend) -> AsyncIterator[tuple[AsyncCache, Web]]:
    """A server in this process, with a backend that a test has a hold on."""
    async with AsyncCache(
        CacheConfig(l1_bytes=2**20, load_timeout_seconds=0.1, breaker_failures=1), [backend]
    ) as cache:
        watch = Watch(cache.core, tenant_of)
        watch.open()
        async with Server(cache, ServerConfig(listen=(f"unix://{directory}/s",))) as served:
            http = HTTPServer(served, watch)
            http.open(http_address("127.0.0.1:0"))
            try:
                assert http.address is not None
                yield cache, Web(f"http://127.0.0.1:{http.address.port}")
            finally:
                backend.release()
                await http.close()
                await http.close()
                await watch.close()


async def test_an_open_breaker_and_quarantined_memory_make_it_unhealthy(tmp_path: Path) -> None:
    backend = GatedBackend(MemoryBackend(name="near"), stubborn=True)
    async with inside(tmp_path, backend) as (cache, site):
        await fill(cache, make_prompt(3))
        await cache.flush()
        await cache.clear("l1")
        backend.hold("load")
        await cache.prefetch(make_prompt(3)).load_done
        code, told = await asyncio.to_thread(site.json, "/healthz")
        assert (code, told) == (503, {"status": "unhealthy", "problems": ["breaker", "quarantine"]})
        _, status = await asyncio.to_thread(site.json, "/status")
        assert [p["detail"] for p in status["problems"] if p["what"] == "breaker"] == [
            "backend near is left alone: open"
        ]
        shown = await asyncio.to_thread(samples, site)
        assert (shown["async_cache_problem breaker"], shown["async_cache_problem lag"]) == (1, 0)
        assert shown["async_cache_backend_breaker near open"] == 1
        assert shown["async_cache_l1_bytes quarantined"] > 0


def test_a_task_that_outlives_its_deadline_a_lag_and_a_dead_sweeper_make_it_unhealthy() -> None:
    async def main() -> None:
        backend = GatedBackend(MemoryBackend(), "lookup")
        config = CacheConfig(l1_bytes=2**20, lookup_timeout_seconds=1000)
        async with AsyncCache(config, [backend]) as cache:
            watch = Watch(cache.core, tenant_of)
            watch.open()
            prefetch = cache.prefetch(make_prompt(1), request_id="acme\0engine\0slow", deadline_seconds=100)
            await asyncio.sleep(99)
            assert problems(watch) == []
            request = cache.core.requests.find("acme\0engine\0slow")
            assert request is not None and request.deadline is not None
            due = request.deadline
            request.deadline.cancel()  # the fault: nothing ends it
            await asyncio.sleep(10)
            assert request.deadline is due
            assert problems(watch) == [Problem("task", "request 'slow' is looking up 9 s after its deadline")]
            prefetch.cancel()
            assert problems(watch) == []
            cache.core.sweeping.cancel()
            await asyncio.sleep(0)
            assert [problem.what for problem in problems(watch)] == ["sweeper"]
            clock = watch.clock
            watch.clock = lambda: clock() + (2.0 if clock() > 110 else 0.0)
            await asyncio.sleep(2)
            assert [problem.what for problem in problems(watch)] == ["sweeper", "lag"]
            await watch.close()
            backend.release()

    run_virtual(main())


def test_a_request_whose_deadline_is_now_is_looked_at_as_any_other() -> None:
    async def main() -> None:
        backend = GatedBackend(MemoryBackend(), "lookup")
        async with AsyncCache(CacheConfig(l1_bytes=2**20), [backend]) as cache:
            watch = Watch(cache.core, tenant_of)
            prefetch = cache.prefetch(make_prompt(1), deadline_seconds=1e-4)  # uvloop counts milliseconds
            assert not prefetch.lookup_done.done()
            assert problems(watch) == []
            backend.release()

    uvloop.run(main())


def test_a_request_without_a_deadline_may_take_as_long_as_its_calls() -> None:
    async def main() -> None:
        backend = GatedBackend(MemoryBackend(), "lookup")
        config = CacheConfig(l1_bytes=2**20, lookup_timeout_seconds=1000, load_timeout_seconds=30)
        async with AsyncCache(config, [backend]) as cache:
            watch = Watch(cache.core, tenant_of)
            prefetch = cache.prefetch(make_prompt(1))
            watch.clock = lambda: 2034.0
            assert problems(watch) == []
            watch.clock = lambda: 2036.0
            assert [problem.what for problem in problems(watch)] == ["task"]
            prefetch.cancel()
            backend.release()

    run_virtual(main())
