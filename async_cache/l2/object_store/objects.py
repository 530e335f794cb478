"""One object in a bucket: a record (see `l2.record`), read in ranges side by side and verified, or written whole.

obstore collects what a request brings in memory of its own. From there it is copied once, to where it belongs; the
checksum is that of what has arrived there.
"""

import asyncio
from mmap import mmap

from msgspec import Struct
from obstore import get_range_async, put_async
from obstore.store import ObjectStore
from xxhash import xxh3_64

from async_cache.l2.object_store.faults import is_beyond_end
from async_cache.l2.object_store.requests import Requests
from async_cache.l2.record import TRAILER_BYTES, is_trailer, write_trailer
from async_cache.prompt.keys import ObjectKey

PARTS_AT_A_TIME = 4  # of one upload


class Objects(Struct, frozen=True):
    """How objects are read and written: the clients, their bounds, and what waits for what is under way."""

    loads: ObjectStore
    stores: ObjectStore
    loading: asyncio.Semaphore
    storing: asyncio.Semaphore
    storing_in_parts: asyncio.Semaphore
    part_bytes: int
    requests: Requests

    async def read(self, path: str, key: ObjectKey, body: memoryview) -> bool:
        """Fill a body, and say whether all of it is there and verified. Raises what obstore does.

        When it returns, raises or is cancelled, nothing touches the body any more.
        """
        try:
            return await self._read(path, key, body)
        except Exception as error:
            if is_beyond_end(error):
                return False
            raise

    async def _read(self, path: str, key: ObjectKey, body: memoryview) -> bool:
        digest = xxh3_64()
        *firsts, last = _ranges(len(body), self.part_bytes)
        if not firsts:
            tail = await self._fill(path, body, *last, digest)
        else:
            tail = await self._fill_side_by_side(path, body, [*firsts, last], digest)
        return tail is not None and len(tail) == TRAILER_BYTES and is_trailer(tail, key, len(body), digest.intdigest())

    async def _fill_side_by_side(
        self, path: str, body: memoryview, ranges: list[tuple[int, int]], digest: xxh3_64
    ) -> bytes | None:
        """Fill a body with ranges as they come, and hash them in order behind that; return what follows the last."""
        tasks = [asyncio.create_task(self._fill(path, body, begin, end)) for begin, end in ranges]
        try:
            for task, (begin, end) in zip(tasks, ranges, strict=True):
                if (tail := await task) is None:
                    return None
                async for block in self.requests.blocks(end - begin):
                    digest.update(body[begin:end][block])
            return tail
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _fill(
        self, path: str, body: memoryview, begin: int, end: int, digest: xxh3_64 | None = None
    ) -> bytes | None:
        """Fill a range of a body, and hash it if it can be done on the way.

        Returns what follows the body, where this range is its last: the trailer, if nothing else is there. None where
        the object is shorter.
        """
        more = TRAILER_BYTES + 1 if end == len(body) else 0
        async with self.loading:  # until it is copied: so it bounds the memory, too
            answer = memoryview(await get_range_async(self.loads, path, start=begin, end=end + more))
            if len(answer) < end - begin + max(0, more - 1):
                return None
            into = body[begin:end]
            async for block in self.requests.blocks(len(into)):
                into[block] = answer[block]
                if digest is not None:
                    digest.update(into[block])
            return bytes(answer[len(into) :])

    async def write(self, path: str, key: ObjectKey, body: memoryview) -> None:
        """Write a record: others see all of it, or nothing. Raises what obstore does.

        It is sent from a copy, since what has left for the network would be read after a cancel, too. A cancel waits
        until the request has ended: else it could be stored later, or its parts would stay for ever.
        """
        in_parts = len(body) > 2 * self.part_bytes
        async with self.storing_in_parts if in_parts else self.storing:
            record = await self._record(key, body)
            upload = put_async(
                self.stores,
                path,
                record,
                use_multipart=in_parts,
                chunk_size=self.part_bytes,
                max_concurrency=PARTS_AT_A_TIME,
            )
            del record  # it is obstore's now
            await self.requests.to_its_end(asyncio.ensure_future(upload))

    async def _record(self, key: ObjectKey, body: memoryview) -> memoryview:
        """The record of an object, in a mapping: a bytearray is filled with zeros at once, which holds the loop."""
        into, digest = memoryview(mmap(-1, len(body) + TRAILER_BYTES)), xxh3_64()
        async for block in self.requests.blocks(len(body)):
            into[block] = body[block]
            digest.update(into[block])
        write_trailer(into[len(body) :], key, len(body), digest.intdigest())
        return into


def _ranges(size_bytes: int, part_bytes: int) -> list[tuple[int, int]]:
    """So many bytes in ranges of equal size, as few as there may be."""
    count = max(1, -(-size_bytes // part_bytes))
    step = -(-size_bytes // count)
    return [(begin, min(begin + step, size_bytes)) for begin in range(0, max(1, size_bytes), max(1, step))]
