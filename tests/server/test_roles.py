"""Tokens come and go while the server runs, and say what their tenant may do."""

import os
import signal

import pytest
from contract.support import fill, make_prompt

from async_cache import AccessDeniedError, ConnectionLostError, connect
from async_cache.protocol import messages
from async_cache.server.access import Access, Pass, Tenant, pass_of

from .programs import server
from .support import Peer, wait_until

RED, OLD, NEW, READER, STORER = (f"token-of-{name:_<16}" for name in ("red", "old", "new", "reader", "storer"))
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
"""


@pytest.fixture
def served(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(tenants(RED, OLD))
    with server(tmp_path, f"unix://{tmp_path}/s", "tcp://127.0.0.1:0", config=path) as served:
        served.config = path
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


def test_every_token_is_compared_whichever_fits():
    access = Access({})
    assert access.admit(Pass(None, over_unix=False)) == Tenant()
    with pytest.raises(AccessDeniedError):
        access.admit(pass_of(RED, over_unix=True))
