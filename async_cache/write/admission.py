"""Which chunks were asked for often enough to be written to a backend that admits no others."""

import asyncio
from collections.abc import Callable, Collection, Sequence

from async_cache.handles.prefetch import Prefetch
from async_cache.observe import Observer
from async_cache.read.request import Request
from async_cache.retention.sketch import Sketch
from async_cache.values import LoadResult

_AT_ONCE = 2048  # chunks, in a millisecond or two; then the loop gets its turn


class Admission(Observer):
    """Counts how often chunks are asked for, by prefetches, when these have loaded.

    `reached` is called for chunk `number` of a prompt of these hashes when it was asked for as often as one of the
    `thresholds` says.
    """

    def __init__(self, reached: Callable[[Sequence[bytes], int], None]):
        self.thresholds: Collection[int] = ()
        self._reached = reached
        self._sketch = Sketch()

    def count(self, chunk_hash: bytes) -> int:
        """How often a chunk was asked for of late."""
        return self._sketch.count(chunk_hash)

    def loaded(self, prefetch: Prefetch, result: LoadResult) -> None:
        """Count the chunks of a request, whether they were found or not."""
        request = prefetch.promised
        if isinstance(request, Request) and request.prompt.hashed:
            for prompt in request.prompt.parts:
                self._add(prompt.chunk_hashes, 0)

    def _add(self, hashes: Sequence[bytes], begin: int) -> None:
        end = min(begin + _AT_ONCE, len(hashes))
        for number in range(begin, end):
            if self._sketch.add(hashes[number]) in self.thresholds:
                self._reached(hashes, number)
        if end < len(hashes):
            asyncio.get_running_loop().call_soon(self._add, hashes, end)
