"""Tokens come and go while the server runs, and say what their tenant may do."""

import os
import signal
from typing import get_args

import pytest
from contract.support import fill, make_prompt

from async_cache import AccessDeniedError, ConnectionLostError, UnknownRequestError, connect
from async_cache.protocol import messages
from async_cache.server.access import Access, Pass, Tenant, pass_of
from async_cache.server.roles import OF_ALL_ROLES, OF_ROLES

from .programs import server
from .support import Peer, wait_until

RED, OLD, NEW, READER, STORER, WATCHER, BLUE, STORES_ALL = (
    f"token-of-{name:_<16}" for name in ("red", "old", "new", "reader", "storer", "watcher", "blue", "stores all")
)
PROMPT = make_prompt(3, 70, salt="red")

CHANGED = "settings are changed: server.tenants"


def tenants(*tokens, more=""):
    return f"""
[server.tenants.red]
tokens = {list(tokens)}
salts = ["red"]
{more}
[server.tenants.reader]
tokens = ["{READER}"]
salts = ["red"]
role = "read"

[server.tenants.storer]
tokens = ["{STORER}"]
salts = ["red"]
role = "store"

[server.tenants.watcher]
tokens = ["{WATCHER}"]
salts = []
role = "watch"

[server.tenants.blue]
tokens = ["{BLUE}"]
salts = ["blue"]

[server.tenants.all]
tokens = ["{STORES_ALL}"]
role = "store"
"""


@pytest.fixture
def served(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(tenants(RED, OLD))
    with server(tmp_path, f"unix://{tmp_path}/s", "tcp://127.0.0.1:0", config=path) as served:
        served.config = path
        yield served


@pytest.fixture(scope="module")
def served_once(tmp_path_factory):
    directory = tmp_path_factory.mktemp("roles")
    path = directory / "c.toml"
    path.write_text(tenants(RED))
    with server(directory, config=path) as served:
        yield served


async def read_anew(served, text, line):
    served.config.write_text(text)
    before = served.log.count(line)
    os.kill(served.pid, signal.SIGHUP)

    async def is_read():
        return served.log.count(line) > before

    await wait_until(is_read)


async def is_refused(client):
    try:
        await client.ping()
    except (ConnectionLostError, AccessDeniedError):
        return True
    return False


async def test_tenants_are_read_anew_and_who_is_gone_is_sent_away(served):
    async with connect(served.url, token=RED) as red, connect(served.urls[1], token=OLD) as old:
        await read_anew(served, tenants(RED, NEW), CHANGED)
        await wait_until(lambda: is_refused(old))
        await red.ping()
        async with connect(served.url, token=NEW) as new, connect(served.url) as us:
            await new.ping()
            await us.ping()
        with pytest.raises(AccessDeniedError):
            await connect(served.url, token=OLD).open()
    assert OLD not in served.log and NEW not in served.log


async def test_rights_that_change_end_connections_and_limits_do_not(served):
    with Peer(served.url, token=RED) as red:
        await read_anew(served, tenants(RED, more="[server.tenants.red.limits]\nconnections = 1\n"), CHANGED)
        red.send(messages.Ping(1))
        assert red.answers(1) == [messages.Done(1)]
        await read_anew(served, tenants(RED).replace('salts = ["red"]', 'salts = ["blue"]', 1), CHANGED)
        assert red.answers(1)[0].code == "access_denied"


async def test_a_file_that_cannot_be_used_changes_nothing(served):
    async with connect(served.url, token=OLD) as old:
        await read_anew(served, "[server.tenants.red]\ntokens = [1]\n", "settings are as they were: ")
        await old.ping()


async def test_a_tenant_may_only_read_or_only_store(served):
    async with connect(served.url, token=READER) as reader, connect(served.url, token=STORER) as storer:
        with pytest.raises(AccessDeniedError, match="only read"):
            await reader.store(PROMPT)
        with pytest.raises(AccessDeniedError, match="only read"):
            await reader.delete(PROMPT)
        await fill(storer, PROMPT)
        await storer.flush()
        with pytest.raises(AccessDeniedError, match="only store"):
            await storer.lookup(PROMPT)
        with pytest.raises(AccessDeniedError, match="only store"):
            await storer.prefetch(PROMPT).lookup_done
        assert (await reader.lookup(PROMPT)).chunks == 3


READS, STORES, ALL = {"reader"}, {"storer", "all"}, set()
"""Who may, of those who have a role."""
CALLS = {
    "prefetch": (READS, lambda cache: cache.prefetch(PROMPT).lookup_done),
    "lookup": (READS, lambda cache: cache.lookup(PROMPT)),
    "prefetch_segments": (READS, lambda cache: cache.prefetch_segments([PROMPT]).lookup_done),
    "lookup_segments": (READS, lambda cache: cache.lookup_segments([PROMPT])),
    "explain": (READS, lambda cache: cache.explain(PROMPT)),
    "read": (READS, lambda cache: enter(cache.read("nobody's"))),
    "query_status": (READS, lambda cache: cache.query_status("nobody's")),
    "query_lookup_hits": (READS, lambda cache: cache.query_lookup_hits("nobody's")),
    "store": (STORES, lambda cache: enter(cache.store(PROMPT))),
    "delete": (STORES, lambda cache: cache.delete(PROMPT)),
    "flush": (STORES, lambda cache: cache.flush()),
    "clear": (ALL, lambda cache: cache.clear()),
    "backends": (ALL, lambda cache: cache.backends()),
    "reload": (ALL, lambda cache: cache.reload()),
    "stats": ({"reader", "storer", "all", "watcher"}, lambda cache: cache.stats()),
    "ping": ({"reader", "storer", "all", "watcher"}, lambda cache: cache.ping()),
}


async def enter(entered):
    async with entered:
        pass


def test_of_every_message_it_is_said_who_may_send_it():
    operators = {messages.Clear, messages.AddBackend, messages.DrainBackend, messages.RemoveBackend}
    operators |= {messages.ListBackends, messages.Reload}
    assert operators.isdisjoint(OF_ROLES) and OF_ALL_ROLES.isdisjoint(OF_ROLES)
    assert operators | OF_ALL_ROLES | set(OF_ROLES) == {*get_args(messages.Request)}


@pytest.mark.parametrize("call", CALLS)
async def test_who_has_a_role_may_do_what_belongs_to_it_and_nothing_else(served_once, call):
    may, ask = CALLS[call]
    for name, token in (("reader", READER), ("storer", STORER), ("watcher", WATCHER), ("all", STORES_ALL)):
        async with connect(served_once.url, token=token) as cache:
            denied = False
            try:
                await ask(cache)
            except AccessDeniedError:
                denied = True
            except UnknownRequestError:
                pass
            assert denied == (name not in may), name


async def test_who_may_not_read_gets_no_memory_to_look_at(served_once):
    with Peer(served_once.url, token=STORES_ALL) as peer:
        assert peer.welcome.mapped is False and peer.arena_fd is None


async def test_statistics_and_a_flush_are_a_tenants_own_and_a_watcher_is_told_of_all(served_once):
    async with (
        connect(served_once.url, token=BLUE) as blue,
        connect(served_once.url, token=STORER) as storer,
        connect(served_once.url, token=WATCHER) as watcher,
    ):
        await fill(storer, PROMPT)
        own = make_prompt(2, 71, salt="blue")
        nothing = await blue.stats()
        await fill(blue, own)
        async with blue.store(make_prompt(1, 72, salt="blue")):
            before = await blue.stats()
        assert (nothing.l1_chunks, nothing.l1_used_bytes, nothing.writebacks_pending) == (0, 0, 0)
        assert before.l1_chunks == 2 and before.reserved_bytes > 0 and not before.backends
        assert before.limits["connections"].used == 1 and before.limits["waiting"].most == 8192
        assert (await blue.flush()).written in (0, 2)
        assert (await storer.flush()).pending == 0
        request = blue.prefetch(own)
        await request.load_done
        now = await blue.stats()
        assert (now.requests, now.leases, now.l1_chunks) == (1, 2, 2) and now.leased_bytes == now.l1_used_bytes
        seen = await watcher.stats()
        assert (seen.requests, seen.l1_chunks) == (1, 5) and seen.backends and not seen.limits
        await storer.delete(PROMPT)
        await blue.delete(own)


def test_every_token_is_compared_whichever_fits():
    access = Access({})
    assert access.admit(Pass(None, over_unix=False)) == Tenant()
    with pytest.raises(AccessDeniedError):
        access.admit(pass_of(RED, over_unix=True))
