"""Nothing is unpickled or executed, whatever is said and stored."""

import ast
import json
import os
import pickle
from pathlib import Path
from typing import get_args

import pytest
from contract.support import fill, make_layout, make_prompt, object_keys, read_back
from faults.disk import place_of

import async_cache
from async_cache import BlockingClient, ConfigError, ObjectGroup, connect
from async_cache.l2.filesystem.format import index_name, segment_name
from async_cache.protocol import messages
from async_cache.protocol.connection import Connection

from .programs import heard, program, server
from .support import MIB, Peer, given_back

SIZE = 64
LAYOUT = make_layout(ObjectGroup((SIZE,), "uint8"), ObjectGroup((MIB,), "uint8"), world_size=2)
CHUNKS = 3


class Malicious:
    """Unpickled, it would run a command."""

    def __reduce__(self):
        return os.system, ("echo pwned",)


POISON = pickle.dumps(Malicious())


async def use_all(cache, number):
    """All that a client can say."""
    prompt, poisoned = make_prompt(CHUNKS, number, LAYOUT), make_prompt(CHUNKS, number + 1, LAYOUT)
    await fill(cache, prompt)
    async with cache.store(poisoned) as writer:
        for chunk in writer:
            for view in chunk.views:
                view[: len(POISON)] = POISON
            chunk.commit()
    await cache.flush()
    await cache.clear("l1")
    assert (await cache.lookup(prompt)).chunks == CHUNKS
    assert await read_back(cache, prompt) == CHUNKS
    prefetch = cache.prefetch(poisoned, request_id=POISON.decode("latin-1"), ranks=[0])
    await cache.query_lookup_hits(prefetch.request_id)
    await cache.renew(prefetch.request_id)
    cache.unclaim(await cache.query_status(prefetch.request_id))
    await cache.end_request(prefetch.request_id)
    prefetch = cache.prefetch(prompt)
    cache.unclaim(await cache.query_status(prefetch.request_id))
    await cache.end_request(prefetch.request_id)
    prefetch = cache.prefetch(prompt, wait_for_writers_seconds=1)
    async with cache.stream(prefetch.request_id) as stream:
        assert len([chunk async for chunk in stream]) == CHUNKS
    cache.prefetch(poisoned).cancel()
    await cache.delete(poisoned)
    await cache.delete_model("nobody's")
    await cache.explain(prompt)
    async with cache.events() as events:
        await cache.delete(prompt)
        await anext(events)
    await fill(cache, prompt)
    await cache.flush()
    assert await cache.roots() and await cache.chunks(limit=10)
    assert (await cache.retain(prompt)).chunks == CHUNKS
    assert await cache.retained()
    assert (await cache.retain(prompt, ttl_seconds=0)).chunks == 0
    await cache.hint(prompt, output_tokens=1, returns=False)
    assert (await cache.warm(prompt)).chunks == CHUNKS
    with pytest.raises(ConfigError):
        await cache.reload()
    parts = [prompt, prompt.layout.segment(range(number, number + 8), context=[1])]
    assert (await cache.lookup_segments(parts)).chunks == CHUNKS
    prefetch = cache.prefetch_segments(parts)
    assert (await prefetch.load_done).chunks == CHUNKS
    await cache.end_request(prefetch.request_id)
    await cache.stats()
    await cache.ping()
    return prompt


def damage(directory, prompt):
    """Put the poison into the objects of a prompt, and files of its own beside theirs."""
    for key in object_keys(prompt):
        place = place_of(directory, key)
        place.write(POISON[: place.size_bytes])
    (directory / segment_name(7, 0)).write_bytes(POISON)
    (directory / index_name(7, 0)).write_bytes(POISON)
    (directory / "evil.pkl").write_bytes(POISON)


def talk_nonsense(url):
    """Frames that are no messages, and messages that make no sense."""
    for payload in (POISON, b"\xc7\xff\x01" + POISON, b"\x91" * 2000, b"\x92\xa4Ping" + POISON):
        with Peer(url) as peer:
            peer.socket.sendall(len(payload).to_bytes(4, "little") + payload)
            (failed,) = peer.answers(1)
            assert isinstance(failed, messages.Failed)


async def test_nothing_is_unpickled_or_executed_in_a_whole_run(tmp_path, monkeypatch):
    sent = record(monkeypatch)
    urls = f"unix://{tmp_path}/s", "tcp://127.0.0.1:0"
    with server(tmp_path, *urls, l2=[f"fs://{tmp_path}/l2"], via=["server.audited"]) as served:
        for number, url in enumerate(served.urls):
            async with connect(url, "namespace") as cache:
                prompt = await use_all(cache, 10 * number)
                damage(tmp_path / "l2", prompt)
                await cache.clear("l1")
                assert (await cache.prefetch(prompt).load_done).chunks == 0
            talk_nonsense(url)
        with BlockingClient(served.url) as blocking:
            prefetch = blocking.prefetch(make_prompt(2, 99, LAYOUT))
            assert prefetch.load_done.result().chunks == 0
        async with connect(served.url) as cache:
            await cache.add_backend(f"fs://{tmp_path}/more")
            name = (await cache.backends())[1].name
            await cache.drain_backend(name)
            await cache.remove_backend(name)
            await given_back(cache)
        assert served.stop() == 0
        told = json.loads(served.child.stdout.readlines()[-1])
    assert {kind.__name__ for kind in get_args(messages.Request)} - sent == set()
    assert told["seen"] > 0
    assert told["forbidden"] == {}


def test_what_is_forbidden_would_be_seen():
    with program("server.audited", "canary") as child:
        events = {event.split()[0] for event in json.loads(heard(child))}
    assert {"pickle.find_class", "marshal.loads", "exec", "os.system", "subprocess.Popen", "import"} <= events


def record(monkeypatch):
    """The names of the messages that clients of this process send."""
    sent = set()
    send = Connection.send

    def recorded(connection, message):
        sent.add(type(message).__name__)
        send(connection, message)

    monkeypatch.setattr(Connection, "send", recorded)
    return sent


FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "subprocess", "pty", "code", "runpy"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "system", "popen", "__import__"}


def test_nothing_that_unpickles_or_executes_is_in_the_source():
    for path in Path(async_cache.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not {name.name.partition(".")[0] for name in node.names} & FORBIDDEN_MODULES, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in FORBIDDEN_MODULES, path
            elif isinstance(node, ast.Call):
                called = node.func
                plain = isinstance(called, ast.Name) and called.id in FORBIDDEN_CALLS
                method = isinstance(called, ast.Attribute) and called.attr in {"system", "popen"}
                assert not plain and not method, f"{path}:{node.lineno}"
