"""TLS below a connection: a dial that is given up leaves nothing open, at whatever turn of the loop that is."""

import asyncio
import gc
import socket
import ssl
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import uvloop
from server.certificates import Authority

from async_cache.client.dial import dial
from async_cache.protocol.address import Address
from async_cache.protocol.messages import VERSION, Hello

TURNS = 30  # of the loop, when the handshake is over and nobody answers the greeting


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_a_dial_that_is_given_up_at_any_turn_leaves_no_transport_open(run: Callable[..., Any], tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    files = authority.issue("server")
    context = ssl.create_default_context(cafile=authority.ca)

    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(*files)
    shaken = threading.Semaphore(0)
    held: list[socket.socket] = []

    def serve(listening: socket.socket) -> None:
        """Shake hands, and say nothing."""
        while True:
            try:
                theirs = listening.accept()[0]
            except OSError:
                return
            held.append(theirs)
            with suppress(OSError):
                held.append(serving.wrap_socket(theirs, server_side=True))
            shaken.release()

    async def given_up(port: int, turns: int) -> None:
        address = Address.parse(f"tls://127.0.0.1:{port}?ca={authority.ca}")
        dialling = asyncio.create_task(dial(address, Hello(VERSION), lambda *_: None, 60, context))
        for _ in range(turns):
            await asyncio.sleep(0)
        if turns == TURNS:
            await asyncio.to_thread(shaken.acquire)
            for _ in range(TURNS):
                await asyncio.sleep(0)
        dialling.cancel()
        await asyncio.wait([dialling])

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,), daemon=True)
        thread.start()
        port = listening.getsockname()[1]
        gc.collect()
        gc.freeze()  # each collection visits what a dial left, and not all that other tests did
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for turns in (TURNS, *range(TURNS)):
                    run(given_up(port, turns))
                    gc.collect()
        finally:
            gc.unfreeze()
        listening.shutdown(socket.SHUT_RDWR)
    for sock in held:
        sock.close()
    assert {str(warning.message) for warning in caught if "unclosed" in str(warning.message)} == set()
