"""What clients make a server keep is in no cycle when it goes, and need not be collected, which may take long."""

import asyncio
import gc
import json
import signal
import weakref
from contextlib import suppress

import pytest
from contract.support import fill, make_prompt

from async_cache import AsyncCacheError, connect
from async_cache.server import garbage
from async_cache.server.garbage import Collections
from async_cache.testing.virtual import run_virtual

from .certificates import Authority
from .programs import heard, server
from .support import Peer

TOKEN = "token-of-red____________"
CONFIG = f'[server.tenants.red]\ntokens = ["{TOKEN}"]\nsalts = ["red"]\n'
ROUNDS = 5


async def do_everything(url, n, **how):
    """What a client may do, that goes well or not, and leave some of it open."""
    async with connect(url, **{"token": TOKEN} | how) as client:
        prompt, absent = make_prompt(4, n, salt="red"), make_prompt(9, n + 1000, salt="red")
        await fill(client, prompt)
        request = client.prefetch(prompt)
        await request.load_done
        async with client.read(request.request_id):
            pass
        await client.prefetch(prompt, request_id="r").load_done
        with suppress(AsyncCacheError):
            client.prefetch(absent, request_id="r")
        for call in (client.query_status("unknown"), client.read("unknown"), client.clear()):
            with suppress(AsyncCacheError):
                await call
        await client.end_request("r")
        client.prefetch(absent).cancel()
        for ask in (client.lookup, client.explain, client.retain, client.warm, client.hint):
            await ask(prompt)
        await asyncio.gather(client.retained(), client.stats(), client.flush())
        client.prefetch(prompt, request_id="unread")
        await client.store(make_prompt(8, n + 500, salt="red"))
        events, waits = client.events(), asyncio.create_task(client.query_status("unread"))
        with suppress(TimeoutError):
            await asyncio.wait_for(anext(events), 0.01)
        await waits
        await client.delete(prompt)


async def churn(served, rounds, ca):
    unix, tls = served.urls
    for n in range(rounds):
        await do_everything(unix, n)
        await do_everything(f"{tls}?ca={ca}", n)
        with suppress(AsyncCacheError):
            await do_everything(f"{tls}?ca={ca}", n, token="wrong")
        with Peer(unix, hello=False) as odd:
            odd.socket.sendall(b"\3\0\0\0odd")
        with Peer(unix, token=TOKEN) as odd:
            odd.socket.sendall(b"\3\0\0\0odd")


def uncollected(served):
    served.child.send_signal(signal.SIGUSR1)
    return json.loads(heard(served.child))


async def test_nothing_that_goes_waits_for_a_collection(tmp_path):
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    (tmp_path / "c.toml").write_text(CONFIG)
    urls = f"unix://{tmp_path}/s", f"tls://127.0.0.1:0?cert={cert}&key={key}"
    settings = {"via": ("server.uncollected",), "config": tmp_path / "c.toml", "l2": [f"fs://{tmp_path}/l2"]}
    with server(tmp_path, *urls, **settings) as served:
        await churn(served, 1, authority.ca)
        async with connect(served.urls[0], token=TOKEN) as client:
            await client.ping()
        await asyncio.to_thread(uncollected, served)
        await churn(served, ROUNDS, authority.ca)
        async with connect(served.urls[0], token=TOKEN) as client:
            await client.ping()
        left = await asyncio.to_thread(uncollected, served)
        of_ctypes = "PyCArrayType", "StgDict", "getset_descriptor", "tuple"  # a type for each size of a segment
        assert sum(n for name, n in left.items() if name not in of_ctypes) < ROUNDS, left


@pytest.mark.parametrize(("seconds", "frozen"), [(0.001, False), (0.003, True)])
def test_what_a_long_collection_found_alive_is_not_looked_at_again(seconds, frozen):
    now, before = iter((10.0, 10.0 + seconds)), gc.get_freeze_count()
    told = Collections(lambda: next(now))
    gc.callbacks.append(told)
    try:
        for generation in (0, 2):
            gc.collect(generation)
        assert (gc.get_freeze_count() > before) == frozen, "what was found by a short one may become garbage"
    finally:
        gc.callbacks.remove(told)
        gc.unfreeze()


class Node:
    pass


@pytest.mark.parametrize(("most", "freed"), [(10**9, True), (0, False)])
def test_cycles_that_were_left_out_are_found_later_unless_there_is_very_much(monkeypatch, most, freed):
    async def main():
        monkeypatch.setattr(garbage, "MOST_AGAIN", most)
        node = Node()
        node.itself, gone = node, weakref.ref(node)
        async with garbage.collecting_briefly():
            del node
            gc.collect()
            assert gone() is not None, "it is left out"
            await asyncio.sleep(garbage.AGAIN_SECONDS + 1)
            assert (gone() is None) == freed
        gc.unfreeze()

    run_virtual(main())
