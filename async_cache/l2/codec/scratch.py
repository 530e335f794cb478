"""The memory for encoded objects: a fixed number of slabs, which take turns."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import accumulate
from mmap import mmap

SLAB_BYTES = 32 * 2**20


class Scratch:
    """So many slabs of memory; who wants one waits until one is free, in turn. It belongs to the loop it is made in.

    A slab takes memory when it is first used, and has it from then on. What is longer than a slab gets a mapping of its
    own in place of one, which ends with its use.
    """

    def __init__(self, slabs: int):
        self._free: asyncio.LifoQueue[mmap] = asyncio.LifoQueue()
        for _ in range(slabs):
            self._free.put_nowait(mmap(-1, SLAB_BYTES))

    @asynccontextmanager
    async def borrow(self, sizes: Sequence[int]) -> AsyncIterator[list[memoryview]]:
        """One buffer of each size. They are from one slab, unless it is one object that is longer."""
        slab = await self._free.get()
        try:
            ends = list(accumulate(sizes))
            memory = memoryview(slab if sum(sizes) <= SLAB_BYTES else mmap(-1, sum(sizes)))
            yield [memory[end - size : end] for size, end in zip(sizes, ends, strict=True)]
        finally:
            self._free.put_nowait(slab)


def lots(sizes: Sequence[int]) -> Iterator[slice]:
    """Cut a run of objects of these sizes into pieces that a slab has room for, or that are one object."""
    begin, whole = 0, 0
    for n, size in enumerate(sizes):
        if n > begin and whole + size > SLAB_BYTES:
            yield slice(begin, n)
            begin, whole = n, 0
        whole += size
    if begin < len(sizes):
        yield slice(begin, len(sizes))
