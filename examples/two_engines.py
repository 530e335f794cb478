"""One engine prefills, another one decodes, through one server, and no proxy: three processes.

    python examples/two_engines.py

Both are engines of `engine.py`. The one that prefills announces the whole prompt before it computes any of it; the one
that decodes is told of the request then, and its lookup waits for what is announced.
"""

import asyncio
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from engine import LAYOUT, Engine, Request

from async_cache import AsyncCache, AsyncCacheError, CacheConfig, Prompt, ServerConfig, WriteChunk, connect
from async_cache.server import Server

PROMPT, NEW = list(range(100)), 8
WAIT_SECONDS = 30.0  # for a prefill, at most: then what is there is used, and the rest is computed


class Prefiller(Engine):
    """Computes prompts, each up to the first token that follows, and stores them chunk by chunk as it has them."""

    async def prefill(self, request_id: str, tokens: Sequence[int], announced: Callable[[], object]) -> int:
        """The first token behind the prompt. `announced`: from now on, whoever asks can wait for it."""
        self._room: dict[int, WriteChunk] = {}
        async with self._cache.store(LAYOUT.prompt(tokens)) as writer:
            self._room = {chunk.index: chunk for chunk in writer}  # of what the cache lacks
            announced()
            (token,) = await self.generate(request_id, tokens, 1)
            await asyncio.gather(*self._ending)  # its saves
        return token

    async def _save(self, request: Request, prompt: Prompt, start_chunk: int) -> None:
        try:
            for index in range(start_chunk, len(prompt)):
                if (chunk := self._room.get(index)) is not None and chunk.views[0] is not None:
                    self._copy(request, index, chunk.views[0], into_blocks=False)
                    chunk.commit()
                    await asyncio.sleep(0)  # it may be waited for: let it be told of
        except AsyncCacheError:
            pass


async def running(engine: Engine, work: Callable[[], Awaitable[object]]) -> object:
    """Do some work of an engine while it runs."""
    steps = asyncio.create_task(engine.run())
    try:
        return await work()
    finally:
        await engine.close()
        steps.cancel()


async def prefill(url: str) -> None:
    async with connect(url) as cache:
        engine = Prefiller(cache)
        announced = partial(print, "announced", flush=True)
        token = await running(engine, partial(engine.prefill, "p", PROMPT, announced))
        print(f"{engine.computed} tokens computed, the next one is {token}", flush=True)


async def decode(url: str) -> None:
    async with connect(url) as cache:
        engine = Engine(cache, wait_for_writers_seconds=WAIT_SECONDS)
        tokens = await running(engine, partial(engine.generate, "d", PROMPT, NEW))
        print(f"{engine.computed} tokens computed, the next ones are {tokens}", flush=True)


async def started(*command: str) -> tuple[asyncio.subprocess.Process, asyncio.StreamReader]:
    """A process, and what it prints."""
    process = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    return process, process.stdout


async def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        url = f"unix://{name}/s"
        config = CacheConfig(l1_bytes=2**24, l2=["memory://"])
        async with AsyncCache(config) as cache, Server(cache, ServerConfig(listen=(url,))):
            prefiller, told = await started(__file__, "prefill", url)
            assert await told.readline() == b"announced\n"
            decoder, answer = await started(__file__, "decode", url)  # what a router does: it is told of the request
            print("prefill:", (await told.readline()).decode().strip())
            print("decode: ", (await answer.readline()).decode().strip())
            await asyncio.gather(prefiller.wait(), decoder.wait())


if __name__ == "__main__":
    roles = {"prefill": prefill, "decode": decode}
    asyncio.run(roles[sys.argv[1]](sys.argv[2]) if len(sys.argv) > 1 else main())
