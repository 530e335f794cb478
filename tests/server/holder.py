"""A client that holds a lot, as a program: `python -m server.holder URL idle|busy`."""

import asyncio
import itertools
import sys

from contract.support import fill, make_prompt

from async_cache import connect

from .programs import say
from .support import BIG

PROMPT = make_prompt(10)
REQUESTS = 10
LEASES = (REQUESTS + 1) * len(PROMPT)  # two equal parts are leased once
RESERVATIONS = 20
BIG_CHUNKS = 4


def reserved_prompt(number):
    return make_prompt(1, 1000 + number)


async def hold(url, manner):
    """Have 100 leases: of requests that nobody has claimed, that are claimed, and that are read; and reservations."""
    async with connect(url, namespace="holder") as cache:
        held = []
        for number in range(REQUESTS):
            prefetch = cache.prefetch(PROMPT)
            assert (await prefetch.load_done).chunks == len(PROMPT)
            if number % 3 == 1:
                await cache.query_status(prefetch.request_id)
            if number % 3 == 2:
                held.append(await cache.read(prefetch.request_id))
        await cache.prefetch_segments([PROMPT, make_prompt(len(PROMPT))], request_id="parts").load_done
        held.append(await cache.read("parts"))
        for number in range(RESERVATIONS):
            writer = await cache.store(reserved_prompt(number))
            (chunk,) = writer
            chunk.views[0][:8] = b"unfinish"
            held.append(writer)
        say("holds")
        for number in itertools.count() if manner == "busy" else ():
            await fill(cache, make_prompt(BIG_CHUNKS, 2000 + number % 5, BIG))
            await cache.delete(make_prompt(BIG_CHUNKS, 2000 + number % 5, BIG))
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(hold(*sys.argv[1:]))
