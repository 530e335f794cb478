"""An arena whose memory is all there, and not only promised."""

import asyncio
import logging

from async_cache.errors import ConfigError
from async_cache.memory.arena import Arena
from async_cache.memory.room import check_free
from async_cache.prompt.objects import PAGE_BYTES

log = logging.getLogger(__name__)

_POPULATE_BYTES = 64 * 2**20  # in one step
_PROGRESS_SECONDS = 2.0  # between two lines of the log on how far it is


async def filled_arena(l1_bytes: int) -> Arena:
    """L1's memory, in whole pages, all of it there. Raises ConfigError where the machine does not have so much."""
    size_bytes = l1_bytes // PAGE_BYTES * PAGE_BYTES
    await asyncio.to_thread(check_free, size_bytes)
    try:
        arena = Arena(size_bytes)
        try:
            await _fill(arena)
        except BaseException:
            arena.close()
            raise
    except OSError as error:
        raise ConfigError(f"l1_bytes {l1_bytes}: {error.strerror}") from error
    return arena


async def _fill(arena: Arena) -> None:
    """Fill an arena step by step, and log now and then how far it is."""
    clock = asyncio.get_running_loop().time
    told = clock()
    for begin in range(0, arena.size_bytes, _POPULATE_BYTES):
        end = min(begin + _POPULATE_BYTES, arena.size_bytes)
        await asyncio.to_thread(_fill_part, arena, begin, end)
        if clock() - told >= _PROGRESS_SECONDS:
            told = clock()
            log.info("L1: %d of %d MiB of memory are there", end >> 20, arena.size_bytes >> 20)


def _fill_part(arena: Arena, begin: int, end: int) -> None:
    """Fill a part. What is free is looked at once more: others take memory at the same time."""
    if begin:
        check_free(arena.size_bytes - begin)
    arena.populate(begin, end)
