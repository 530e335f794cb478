"""A worker of an engine, as a program: `python -m server.worker URL RANK`. It has registered no layout, and knows
requests only by their ids. For each line `read ID` it says what it has read, and on `release` that it has left."""

import asyncio
import hashlib
import sys

from async_cache import connect

from .programs import say


async def work(url, rank):
    async with connect(url) as cache:
        lease = None
        while line := await asyncio.to_thread(sys.stdin.readline):
            match line.split():
                case ["read", request_id]:
                    lease = await cache.read(request_id, rank=int(rank))
                    digest = hashlib.sha256(b"".join(bytes(view) for chunk in lease for view in chunk.views if view))
                    say(f"{len(lease)} {digest.hexdigest()}")
                case ["release"]:
                    lease.release()
                    await cache.ping()  # and so the server knows
                    say("left")


if __name__ == "__main__":
    asyncio.run(work(*sys.argv[1:]))
