"""A client that may open only so many descriptors: it connects or says why not, and connects when it may again."""

import asyncio
import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import uvloop
from contract.support import fill, make_prompt, read_back
from server.support import reconnected

from async_cache import ConnectionLostError, LimitError, connect
from async_cache.client import links
from async_cache.protocol.address import Address
from async_cache.server.listener import Listener

from .servers import SECONDS, serve_in_process, short_directory

PROMPT = make_prompt(3)
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
ENOUGH = 5
"""Descriptors with which a client over either transport connects."""


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@contextmanager
def only(count: int) -> Iterator[None]:
    """This process may open so many descriptors, and not one more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, descriptors()))
    taken = [os.open(os.devnull, os.O_RDONLY)]
    while taken[-1] <= highest:
        taken.append(os.open(os.devnull, os.O_RDONLY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[-1] + 1 + count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in taken:
            os.close(descriptor)  # which nobody else has closed


@pytest.fixture(params=["unix", "tcp"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where nothing listens yet."""
    if request.param == "unix":
        with short_directory() as directory:
            yield f"unix://{directory}/s"
    else:
        free = Listener(Address.parse("tcp://127.0.0.1:0"))
        free.close()
        yield str(free.address)


async def attempt(url: str, count: int) -> bool:
    """Whether a client with so many descriptors connects; then it works, and else it says why."""
    with only(count):
        client = connect(url, connect_timeout_seconds=0)
        try:
            await client.open()
        except (ConnectionLostError, LimitError) as error:
            return not re.search("Too many open files|may have no more", str(error))
        else:
            await fill(client, PROMPT)
            assert await read_back(client, PROMPT) == len(PROMPT)
            return True
        finally:
            await client.close()


@pytest.mark.parametrize("make_loop", LOOPS.values(), ids=LOOPS)
def test_a_client_at_its_limit_of_descriptors_connects_or_says_why_and_leaves_none_open(
    make_loop: Callable[[], asyncio.AbstractEventLoop], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "_LAST_ATTEMPT_SECONDS", SECONDS)  # its one attempt does not end by time

    async def dial() -> list[bool]:
        assert await attempt(url, ENOUGH)  # and the loop has what it opens once
        before, connected = descriptors(), []
        for count in range(ENOUGH + 1):
            connected.append(await attempt(url, count))
            assert descriptors() == before, count
        return connected

    with serve_in_process(url), asyncio.Runner(loop_factory=make_loop) as runner:
        connected = runner.run(dial())
    assert connected == sorted(connected) and not connected[0] and connected[-1]


@pytest.mark.parametrize("make_loop", LOOPS.values(), ids=LOOPS)
def test_a_client_that_lost_its_server_at_the_limit_of_descriptors_connects_when_it_may(
    make_loop: Callable[[], asyncio.AbstractEventLoop], url: str
) -> None:
    async def lose_and_find() -> None:
        with serve_in_process(url):
            client = await connect(url).open()
            await fill(client, PROMPT)
        with pytest.raises(ConnectionLostError):
            await client.ping()
        with serve_in_process(url):
            with only(1):
                for _ in range(3):
                    with pytest.raises((ConnectionLostError, LimitError)):
                        await client.ping()
            await reconnected(client)
            assert await read_back(client, PROMPT) == 0
            await client.close()

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(lose_and_find())
