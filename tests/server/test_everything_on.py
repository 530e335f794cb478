"""All at once: requests over both kinds of sockets, of tenants, while the server is watched, explained, told of by
events, reconfigured, and its storage and clients fail. No request is lost, and nothing grows."""

import asyncio
import json
import os
import random
import signal
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from contract.support import fill, make_layout, make_prompt, verify
from l2.valkey.servers import Server as Valkey
from prometheus_client.parser import text_string_to_metric_families
from soak import SOAK_SECONDS

from async_cache import AccessDeniedError, BackendError, CacheClient, ConnectionLostError, ObjectGroup, connect
from async_cache.l2.filesystem.files import OPEN_FILES
from async_cache.l2.filesystem.rewriting import MOST_FILES
from async_cache.prompt.layout import Prompt
from async_cache.testing.proxy import Proxy

from .http import ServedWeb, web
from .support import Peer, given_back, wait_until

LAYOUT = make_layout(ObjectGroup((8192,), "uint8"))
RED, ENGINE = "token-of-red-number-one", "token-of-the-engine-number-one"
QUICK_REQUESTS = 400
SLACK_BYTES, SLACK = 16 * 2**20, 1.05
CONFIG = """
l2 = [{l2}]
lookup_timeout_seconds = 0.5
load_timeout_seconds = {load_timeout}
breaker_reset_seconds = 0.5
result_ttl_seconds = {ttl}
lease_ttl_seconds = 20
reservation_ttl_seconds = 20
explain_chunks = 4096
traces = "otel"
[server]
log_format = "json"
log_level = "{level}"
max_requests = {requests}
[server.tenants.red]
tokens = ["{red}"]
salts = ["red"]
[server.tenants.engine]
tokens = ["{engine}"]
"""


class Look(NamedTuple):
    """What the server takes, at one moment."""

    resident_bytes: int
    descriptors: int
    """But for those of `stored`."""
    stored: int
    """Files of the local store, of which many are kept open."""
    threads: int
    tasks: int


class Everything:
    """What goes on, and how often it did."""

    site: ServedWeb

    def __init__(self, proxy: Proxy, config: Path, l2: list[str]):
        self.proxy, self.config, self.l2 = proxy, config, l2
        self.stored = str(config.with_name("near"))
        self.chance = random.Random(1)
        self.done: dict[str, int] = {}
        self.looks: list[Look] = []
        self.leaves_next = 0.0
        self.stopped = asyncio.Event()

    def count(self, what: str, times: int = 1) -> None:
        self.done[what] = self.done.get(what, 0) + times

    async def again(self, what: str, do: Callable[[], Awaitable[None]], seconds: float = 0) -> None:
        """Do it until the end, each time so much later."""
        while not self.stopped.is_set():
            await do()
            self.count(what)
            if seconds:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.stopped.wait(), seconds)

    # Requests.

    def prompt(self, salt: str) -> Prompt:
        """Few are asked for often, and many now and then: more than memory holds, and more than the directory does."""
        number = int(self.chance.paretovariate(0.6)) % 4000
        return make_prompt(self.chance.randrange(1, 9), 1000 + number, LAYOUT, salt=salt)

    async def request(self, client: CacheClient, salt: str) -> None:
        prompt, fate = self.prompt(salt), self.chance.random()
        prefetch = client.prefetch(prompt, deadline_seconds=self.chance.choice([None, 0.05, 5]))
        hits = await prefetch.lookup_done
        if fate < 0.03:
            prefetch.cancel()
        result = await prefetch.load_done
        assert result.chunks <= hits.chunks
        if 0.03 < fate < 0.05 and time.monotonic() > self.leaves_next:  # more, and the leases are all that it may have
            self.leaves_next = time.monotonic() + 0.5
            self.count("left to the sweeper")
            return
        if fate > 0.05 and result.chunks:
            async with client.read(prefetch.request_id) as lease:
                assert verify(lease, prompt) == list(range(result.chunks))
        await client.end_request(prefetch.request_id)
        if result.chunks < len(prompt):
            await fill(client, prompt)
        self.count("hits", result.chunks)

    # Those who look.

    async def look(self) -> None:
        for path in ("/status", "/healthz", "/metrics"):
            code, _, body = await asyncio.to_thread(self.site.get, path, ENGINE)
            assert code in ((200, 503) if path == "/healthz" else (200,))
        metrics = {s.name: s.value for f in text_string_to_metric_families(body.decode()) for s in f.samples}
        served = self.site.served
        files = served.open_files()
        stored = sum(file.startswith(self.stored) for file in files)
        threads, tasks = len(os.listdir(f"/proc/{served.pid}/task")), int(metrics["async_cache_tasks"])
        self.looks.append(Look(served.resident_bytes(), len(files) - stored, stored, threads, tasks))

    async def explain(self, client: CacheClient, salt: str) -> None:
        prompt = self.prompt(salt)
        spans = (await client.explain(prompt)).spans
        assert sum(span.chunks for span in spans) == len(prompt)
        await client.chunks(limit=10)
        await client.roots()

    async def listen(self, client: CacheClient) -> None:
        async with client.events() as events:
            async for _ in events:
                self.count("events")
                if self.stopped.is_set():
                    return

    # Faults.

    async def fault(self) -> None:
        """One after the other: storage that is silent, cut off, away; a client that is gone, a wrong token."""
        kind = self.done.get("faults", 0) % 5
        if kind == 0:
            self.proxy.stall()
            await asyncio.sleep(1.5)
            self.proxy.resume()
        elif kind == 1:
            self.proxy.reset()
        elif kind == 2:
            await self.proxy.refuse()
            self.proxy.cut()
            await asyncio.sleep(0.5)
            await self.proxy.open()
        elif kind == 3:
            with Peer(self.site.served.url, token=ENGINE) as peer:
                peer.socket.sendall(b"\x10\0\0\0half of it")
        else:
            with pytest.raises((AccessDeniedError, ConnectionLostError)):  # the later, the more there were
                await connect(self.site.served.urls[1], token="token-of-nobody-at-all").open()

    def write_config(self) -> None:
        """Other settings each time: backends that come and go, limits, times, how much is logged."""
        turn = self.done.get("reloads", 0)
        l2 = self.l2[: 2 + turn % 2] if turn % 4 < 2 else self.l2[turn % 2 :]
        settings = {"load_timeout": 2 + turn % 2, "ttl": 20 + turn % 3, "requests": 1000 + turn % 7}
        text = CONFIG.format(
            l2=json.dumps(l2)[1:-1], level=("info", "debug")[turn % 2], red=RED, engine=ENGINE, **settings
        )
        beside = self.config.with_suffix(".new")
        beside.write_text(text)
        beside.replace(self.config)

    async def reload(self, client: CacheClient) -> None:
        self.write_config()
        if self.done.get("reloads", 0) % 3:
            try:
                await client.reload()
            except BackendError:  # one of them was not open in time: all is as it was
                self.count("reloads that changed nothing")
        else:
            os.kill(self.site.served.pid, signal.SIGHUP)

    # All of it.

    async def run(self, until: Callable[[], bool]) -> None:
        unix, tcp = self.site.served.urls
        async with (
            connect(unix, "engine", token=ENGINE) as engine,
            connect(tcp, "red", token=RED) as red,
            connect(unix, "watcher", token=ENGINE) as watcher,
        ):
            slow = watcher.events(capacity=100)  # of which nobody reads any
            tasks = [
                *(self.again("requests", lambda: self.request(engine, "")) for _ in range(4)),
                *(self.again("requests of a tenant", lambda: self.request(red, "red")) for _ in range(2)),
                self.again("looks", self.look, 1),
                self.again("explanations", lambda: self.explain(watcher, ""), 0.1),
                self.again("explanations of a tenant", lambda: self.explain(red, "red"), 0.1),
                self.again("faults", self.fault, 0.3),
                self.again("reloads", lambda: self.reload(watcher), 0.5),
                self.listen(watcher),
            ]
            running = [asyncio.create_task(task) for task in tasks]
            try:
                while not until():
                    ended, _ = await asyncio.wait(running, timeout=0.2, return_when=asyncio.FIRST_COMPLETED)
                    for task in ended:
                        task.result()
                        raise AssertionError("it has ended")
                self.stopped.set()
                await fill(engine, make_prompt(1, 1, LAYOUT))  # an event for who waits for one
                await asyncio.gather(*running)
            finally:
                for task in running:
                    task.cancel()
                await asyncio.wait(running)
            await slow.aclose()


@asynccontextmanager
async def beside(served: AbstractContextManager[ServedWeb]) -> AsyncIterator[ServedWeb]:
    """Begin and end it in a thread: the proxy that it needs is in this one."""
    site = await asyncio.to_thread(served.__enter__)
    try:
        yield site
    finally:
        await asyncio.to_thread(served.__exit__, None, None, None)


@pytest.mark.timeout(SOAK_SECONDS + 300)
async def test_no_request_is_lost_and_nothing_grows(tmp_path: Path) -> None:
    valkey = Valkey(tmp_path / "valkey", "--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru").start()
    config = tmp_path / "cache.toml"
    try:
        async with Proxy("127.0.0.1", valkey.port) as proxy:
            l2 = [f"fs://{tmp_path}/near?capacity=16MiB", f"valkey://127.0.0.1:{proxy.port}?ttl=20", "memory://spare"]
            everything = Everything(proxy, config, l2)
            everything.write_config()
            urls = f"unix://{tmp_path}/s", "tcp://127.0.0.1:0"
            async with beside(
                web(tmp_path, *urls, l2=(), l1="8MiB", config=config, lookup_timeout_seconds=0.5)
            ) as site:
                everything.site = site
                await idle(everything)
                before = everything.looks[-1]
                end = time.monotonic() + SOAK_SECONDS
                done, faults = everything.done, 2 * 5

                def enough() -> bool:
                    if SOAK_SECONDS:
                        return time.monotonic() > end
                    return done.get("requests", 0) > QUICK_REQUESTS and done.get("faults", 0) > faults

                await everything.run(enough)
                await idle(everything, before)
                print(done, before, everything.looks[-1])  # noqa: T201 - what a long run is for
            assert min(done[what] for what in ("hits", "requests of a tenant", "events", "reloads", "looks")) > 2
            if SOAK_SECONDS:
                quarter = len(everything.looks) // 4
                early, late = everything.looks[quarter : 2 * quarter], everything.looks[-quarter:]
                assert max(look.stored for look in everything.looks) <= OPEN_FILES + 2 * MOST_FILES
                for name in set(Look._fields) - {"stored"}:
                    then, now = (statistics.median(getattr(look, name) for look in looks) for looks in (early, late))
                    print(name, then, now)  # noqa: T201
                    assert now <= SLACK * then + (SLACK_BYTES if name == "resident_bytes" else 2), name
    finally:
        valkey.kill()


async def idle(everything: Everything, wanted: Look | None = None) -> None:
    """Wait until nothing is held, and the server has no more than that; look at it then."""
    async with connect(everything.site.served.url, token=ENGINE) as cache:
        await given_back(cache, seconds=90)

    async def is_it() -> bool:
        await everything.look()
        now = everything.looks[-1]
        await asyncio.sleep(0.1)
        return wanted is None or (now.descriptors <= wanted.descriptors + 8 and now.tasks <= wanted.tasks + 4)

    await wait_until(is_it, 30)
