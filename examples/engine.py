"""An engine on the cache: paged, batched, asynchronous. What a connector has to do, and in which order.

    python examples/engine.py

Its model is a hash: the KV of a token follows from all tokens before it, and the next token from the KV. All else is as
in an engine that is none: docs/engines.md goes through it.
"""

import asyncio
import hashlib
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial

from async_cache import AsyncCache, AsyncCacheError, CacheClient, CacheConfig, ModelLayout, ObjectGroup, Prompt

BLOCK, CHUNK, KV = 4, 8, 16  # tokens in a block of the engine, tokens in a chunk of the cache, bytes of a token
STEP_TOKENS = 16  # of a prompt that are computed in a step
LAYOUT = ModelLayout("toy", (ObjectGroup((CHUNK, KV), "uint8"),), chunk_tokens=CHUNK)  # what fixes the bytes
Cache = AsyncCache | CacheClient


class Request:
    """One request: its tokens, the blocks that have their KV, and how many have it by now."""

    def __init__(self, request_id: str, tokens: Sequence[int], new_tokens: int):
        self.id, self.tokens, self.end = request_id, list(tokens), len(tokens) + new_tokens
        self.prompt_tokens, self.prompt = len(tokens), LAYOUT.prompt(tokens)
        self.blocks: list[int] = []
        self.computed = self.cached = self.saved = 0  # tokens
        self.loading: asyncio.Task[None] | None = None
        self.saving: list[asyncio.Task[None]] = []
        self.done: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()


class Engine:
    """Requests wait for their count, then load while others run, then run together, one token each in a step."""

    def __init__(self, cache: Cache, blocks: int = 64, wait_for_writers_seconds: float | None = None):
        self._cache, self._wait = cache, wait_for_writers_seconds
        self._memory = memoryview(bytearray(blocks * BLOCK * KV))
        self.free, self._blocks = list(range(blocks)), blocks
        self.computed = 0  # tokens, by the model
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._ending: set[asyncio.Task[None]] = set()
        self._work = asyncio.Event()

    async def generate(self, request_id: str, tokens: Sequence[int], new_tokens: int) -> list[int]:
        """The tokens that follow. To cancel it is to abort the request."""
        request = Request(request_id, tokens, new_tokens)
        if self._blocks_of(request) > self._blocks:  # else it would wait for ever, and all behind it
            raise ValueError(f"it takes {self._blocks_of(request)} blocks, and there are {self._blocks}")
        # 1. Ask on arrival, long before it is its turn. Nothing here waits.
        prefetch = self._cache.prefetch(request.prompt, request_id=request.id, wait_for_writers_seconds=self._wait)
        lookup = prefetch.lookup_done
        lookup.add_done_callback(partial(self._queue, request))
        try:
            return await request.done
        finally:
            lookup.cancel()
            ending = asyncio.create_task(self._end(request))  # it goes on if this one is cancelled
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)

    def _queue(self, request: Request, lookup: object) -> None:
        self._waiting.append(request)
        self._work.set()

    async def run(self) -> None:
        """Step by step, until it is cancelled."""
        while True:
            self._admit()
            self._running = [request for request in self._running if not request.done.done()]
            for request in self._running:
                self._compute(request)
            if not self._running:
                await self._work.wait()
                self._work.clear()
            await asyncio.sleep(0)

    def _admit(self) -> None:
        """Begin what there are blocks for. The count is known: what is cached needs no step of the model."""
        while self._waiting and (self._waiting[0].done.done() or self._blocks_of(self._waiting[0]) <= len(self.free)):
            request = self._waiting.popleft()
            if not request.done.done():
                request.blocks = [self.free.pop() for _ in range(self._blocks_of(request))]
                request.loading = asyncio.create_task(self._load(request))

    def _blocks_of(self, request: Request) -> int:
        return -(-request.end // BLOCK)

    async def _load(self, request: Request) -> None:
        # 2. Copy each chunk as it comes, while the rest loads and other requests run.
        loaded = 0
        try:
            async with self._cache.stream(request.id) as stream:
                async for chunk in stream:
                    assert chunk.views[0] is not None  # it is, in a layout without windows
                    self._copy(request, chunk.index, chunk.views[0], into_blocks=True)
                if stream.held:  # else the server is gone, and what was copied of its memory may be anything
                    loaded = stream.result.tokens  # 3. What the result does not count is computed, whatever came
        except AsyncCacheError:  # there is no server, or the request was ended: all of it is computed
            pass
        request.computed = request.cached = min(loaded, len(request.tokens) - 1)  # the last one gives the next
        request.saved = loaded // CHUNK
        self._running.append(request)
        self._work.set()

    def _compute(self, request: Request) -> None:
        """One step of the model for a request: some tokens of its prompt, or the next token."""
        for position in range(request.computed, min(request.computed + STEP_TOKENS, len(request.tokens))):
            before = bytes(self._token(request, position - 1)) if position else b""
            token = request.tokens[position].to_bytes(4, "little")
            self._token(request, position)[:] = hashlib.blake2b(before + token, digest_size=KV).digest()
            request.computed += 1
            self.computed += 1
        if request.computed == len(request.tokens) < request.end:
            request.tokens.append(int.from_bytes(self._token(request, request.computed - 1)[:2], "little"))
        # 4. Store whole chunks as soon as they are computed, beside the next steps: others may wait for them.
        if request.computed // CHUNK > request.saved:
            prompt = LAYOUT.prompt(request.tokens[: request.computed // CHUNK * CHUNK])
            request.saving.append(asyncio.create_task(self._save(request, prompt, request.saved)))
            request.saved = len(prompt)
        if len(request.tokens) == request.end:
            request.done.set_result(request.tokens[request.prompt_tokens :])

    async def _save(self, request: Request, prompt: Prompt, start_chunk: int) -> None:
        try:
            async with self._cache.store(prompt, start_chunk=start_chunk) as writer:
                for chunk in writer:  # those that the cache lacks
                    assert chunk.views[0] is not None
                    self._copy(request, chunk.index, chunk.views[0], into_blocks=False)
                    chunk.commit()
        except AsyncCacheError:  # it is not cached, then
            pass

    async def _end(self, request: Request) -> None:
        # 5. Blocks are free when nobody copies from or to them any more, and not before.
        tasks = request.saving if request.loading is None else [request.loading, *request.saving]
        if request.loading is not None:
            request.loading.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.free += request.blocks
        request.blocks = []
        self._work.set()
        # 6. Whatever became of the request: the cache is told that it is over. Here, an abort in any state ends.
        await asyncio.gather(self._cache.end_request(request.id), return_exceptions=True)

    async def close(self) -> None:
        """Wait for the ends of all requests."""
        while self._ending:
            await asyncio.wait(set(self._ending))

    # A paged memory: the tokens of a chunk lie in several blocks.

    def _token(self, request: Request, position: int) -> memoryview:
        begin = (request.blocks[position // BLOCK] * BLOCK + position % BLOCK) * KV
        return self._memory[begin : begin + KV]

    def _copy(self, request: Request, chunk: int, view: memoryview, *, into_blocks: bool) -> None:
        for n in range(CHUNK):
            ours, theirs = self._token(request, chunk * CHUNK + n), view[n * KV : (n + 1) * KV]
            if into_blocks:
                ours[:] = theirs
            else:
                theirs[:] = ours


async def serve(cache: Cache, requests: Iterable[tuple[str, Sequence[int]]]) -> tuple[list[list[int]], int]:
    """What an engine of its own answers to requests, and how many tokens its model has computed for that."""
    engine = Engine(cache)
    running = asyncio.create_task(engine.run())
    answers = await asyncio.gather(*(engine.generate(request_id, tokens, 8) for request_id, tokens in requests))
    await engine.close()
    running.cancel()
    return answers, engine.computed


async def main() -> None:
    requests = [(f"r{n}", [*range(100), n]) for n in range(3)]
    async with AsyncCache(CacheConfig(l1_bytes=2**20, l2=["memory://"])) as cache:
        first, computed = await serve(cache, requests)
        again, computed_again = await serve(cache, requests)
    print(f"the first engine has computed {computed} tokens, the second one {computed_again}")
    print("with the same answers" if first == again else "with OTHER answers")


if __name__ == "__main__":
    asyncio.run(main())
