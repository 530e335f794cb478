"""A listing of all that a backend holds, part by part: each part is a call of its own."""

from collections.abc import AsyncIterator

from async_cache.l2.backend import Backend
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.origin import Selection

Listing = list[AsyncIterator[tuple[ObjectKey, int]]]
"""A listing of a backend's objects: empty until it has begun."""


async def next_keys(
    backend: Backend, listing: Listing, count: int, selection: Selection | None
) -> list[tuple[ObjectKey, int]]:
    """The next objects of a listing, of all or of what is selected; it is begun with the first."""
    if not listing:
        listing.append(aiter(backend.keys() if selection is None else backend.keys_of(selection)))
    objects: list[tuple[ObjectKey, int]] = []
    async for key, size_bytes in listing[0]:
        objects.append((key, size_bytes))
        if len(objects) == count:
            break
    return objects
