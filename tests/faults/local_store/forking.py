"""A process with a cache in a directory and a server at a socket, whose forked child outlives it.

`python -m faults.local_store.forking DIRECTORY SOCKET HOW LOOP`. It forks when it is told a line. Parent and child end
with their standard input.
"""

import asyncio
import multiprocessing
import os
import sys

import uvloop
from contract.support import fill_l2, make_prompt, read_back

from async_cache import AsyncCache, CacheConfig, ServerConfig, connect
from async_cache.server import Server

from ..disk import say

PROMPT = make_prompt(3)


def live_on(end: int) -> None:
    """What the child does."""
    os.write(1, b"forked\n")
    while os.read(end, 1):
        pass


def fork(how: str, end: int) -> None:
    if how == "multiprocessing":
        multiprocessing.get_context("fork").Process(target=live_on, args=(end,)).start()
    elif not os.fork():
        live_on(end)
        os._exit(0)


async def main(directory: str, socket: str, how: str) -> None:
    url, end = f"unix://{socket}", os.dup(0)  # multiprocessing closes the standard input of a child
    cache = AsyncCache(CacheConfig(l1_bytes=2**20, l2=[f"fs://{directory}"]))
    async with cache, Server(cache, ServerConfig(listen=(url,))), connect(url) as client:
        await fill_l2(cache, PROMPT)
        say("serving")
        await asyncio.to_thread(sys.stdin.readline)
        fork(how, end)
        assert await read_back(cache, PROMPT) == await read_back(client, PROMPT) == len(PROMPT)
        say("parent ok")
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    {"asyncio": asyncio.run, "uvloop": uvloop.run}[sys.argv.pop()](main(*sys.argv[1:]))
