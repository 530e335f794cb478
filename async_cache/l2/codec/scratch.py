"""The memory for encoded objects: a fixed number of slabs, which take turns."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import accumulate
from mmap import mmap

SLAB_BYTES = 32 * 2**20
PATIENCE_SECONDS = 1.0  # for a slab; what holds all of them for longer waits for a storage that is silent
MOST_MORE = 6  # mappings that are made in their place


class MemoryFile:
    """Slabs in a memory file, which a backend may register: `fd` to map it elsewhere, `view` to use it here."""

    def __init__(self, slabs: int):
        self.fd = os.memfd_create("async_cache codec", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, slabs * SLAB_BYTES)
            self.view = memoryview(mmap(self.fd, slabs * SLAB_BYTES))
        except BaseException:
            os.close(self.fd)
            raise

    def slabs(self) -> list[memoryview]:
        """All of it, slab by slab."""
        return [self.view[begin : begin + SLAB_BYTES] for begin in range(0, len(self.view), SLAB_BYTES)]

    def close(self) -> None:
        """Give back the descriptor; the memory goes with the last who looks at it."""
        os.close(self.fd)


class Scratch:
    """Some slabs of memory; who wants one waits until one is free, in turn. It belongs to the loop it is made in.

    A slab takes memory when it is first used, and has it from then on. What is longer than a slab gets a mapping of its
    own in place of one, which ends with its use. So does who waits for PATIENCE_SECONDS, MOST_MORE of them at a time:
    who waits for a storage that is silent does not hold up all others.
    """

    def __init__(self, slabs: Sequence[memoryview]):
        self._free: asyncio.LifoQueue[memoryview] = asyncio.LifoQueue()
        for slab in slabs:
            self._free.put_nowait(slab)
        self._more = 0

    @asynccontextmanager
    async def borrow(self, sizes: Sequence[int]) -> AsyncIterator[list[memoryview]]:
        """One buffer of each size. They are from one slab, unless it is one object that is longer."""
        slab = await self._take()
        try:
            ends = list(accumulate(sizes))
            memory = slab if slab is not None and ends[-1] <= SLAB_BYTES else memoryview(mmap(-1, ends[-1]))
            yield [memory[end - size : end] for size, end in zip(sizes, ends, strict=True)]
        finally:
            if slab is not None:
                self._free.put_nowait(slab)
            else:
                self._more -= 1

    async def _take(self) -> memoryview | None:
        """A slab; None where there is none for long."""
        while True:
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    return await self._free.get()
            except TimeoutError:
                if self._more < MOST_MORE:
                    self._more += 1
                    return None


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
