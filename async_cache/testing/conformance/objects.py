"""Objects that no other is like, and short ways to ask a backend about them."""

import asyncio
import hashlib
import random
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from async_cache.l2.backend import Backend, LoadOutcome
from async_cache.prompt.keys import ObjectKey

T = TypeVar("T")

LOADED, GONE, CORRUPT, FAILED = LoadOutcome
MIB = 2**20
LONG = 6 * MIB + 1  # longer than what is copied in one step
CANCEL_AFTER_STEPS = [0, 1, 2, 3, 4, 5, 8, 13, 21, 34, 89, 233]
CANARY = 0xA5


def key(n: int, rank: int = 0, group: int = 0) -> ObjectKey:
    """The key of an object of chunk number `n`."""
    return ObjectKey(hashlib.blake2b(n.to_bytes(8, "little"), digest_size=32).digest(), rank, group)


def content(n: int, size_bytes: int) -> bytes:
    """The bytes of object number `n`: the same for each call, like no other."""
    return random.Random(n).randbytes(size_bytes)


def views(blobs: Sequence[bytes | bytearray]) -> list[memoryview]:
    """The blobs as buffers."""
    return [memoryview(blob) for blob in blobs]


async def put(backend: Backend, numbers: Sequence[int], size_bytes: int) -> list[bool]:
    """Store objects of one size in one call."""
    return await backend.store([key(n) for n in numbers], views([content(n, size_bytes) for n in numbers]))


async def get(backend: Backend, numbers: Sequence[int], size_bytes: int) -> list[bytes | LoadOutcome]:
    """Load objects of one size in one call: for each its bytes, or why there are none."""
    buffers = [bytearray(size_bytes) for _ in numbers]
    outcomes = await backend.load([key(n) for n in numbers], views(buffers))
    return [bytes(buffer) if outcome is LOADED else outcome for buffer, outcome in zip(buffers, outcomes, strict=True)]


async def load_sized(
    backend: Backend, keys: Sequence[ObjectKey], buffers: Sequence[bytearray | memoryview]
) -> list[int | LoadOutcome]:
    """Load into buffers that may be longer than the objects; the test is skipped where the backend need not do that."""
    if type(backend).load_sized is Backend.load_sized:
        pytest.skip("it loads only what it is told the size of")
    return await backend.load_sized(keys, [memoryview(buffer) for buffer in buffers])


async def find(backend: Backend, numbers: Sequence[int]) -> list[bool]:
    """For each object, whether it is there; it is not pinned then."""
    keys = [key(n) for n in numbers]
    found = await backend.lookup(keys)
    backend.unpin([k for k, present in zip(keys, found, strict=True) if present])
    return found


async def nothing_is_pinned(full: Backend) -> bool:
    """Whether an object that needs the room of all others gets it."""
    return await put(full, [1000], 4 * MIB) == [True]


async def cancelled_after(steps: int, call: Coroutine[Any, Any, T]) -> T | None:
    """Cancel a call when the loop has turned so often; return its result if it was done before, else None."""
    task = asyncio.ensure_future(call)
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    try:
        return await task
    except asyncio.CancelledError:
        return None


def seconds_without_core() -> float:
    """For how long this thread has waited for a core, all in all; 0 where the system does not tell.

    It is the second number of Linux's `/proc/thread-self/schedstat`, in nanoseconds.
    """
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


async def holds_the_loop(call: Coroutine[Any, Any, Any]) -> bool:
    """Whether the loop stood still for 50 ms while a call ran, or a quarter of its work was done in one go.

    The work is the CPU time of this thread, which a busy machine does not lengthen; 5 ms in one go are no matter.
    Nor is the time in which this thread could have run, and had no core.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(call)
    gaps, work = [], []
    while not task.done():
        begin, without_core, worked = loop.time(), seconds_without_core(), time.thread_time()
        await asyncio.sleep(0.001)
        work.append(time.thread_time() - worked)
        gaps.append(loop.time() - begin - (seconds_without_core() - without_core))
    await task
    return max(gaps) > 0.05 or max(work) > max(0.005, sum(work) / 4)
