"""How much a prefix of a bucket holds, as far as is known: what a listing found, and what we changed since then.

A bucket has no count that one could ask for. So it is listed once, from the start, and our own stores and deletions
are added as they happen. A listing goes in the order of the names: a change behind the place where it is was counted
already, one before it will be seen by it.
"""

from collections.abc import Iterable

from async_cache.values import BackendUsage

MOST_LISTED = 1_000_000  # objects: a thousand requests, and a minute or two


class Holdings:
    """Objects and bytes of a prefix. What others have changed since the listing is not in it."""

    def __init__(self) -> None:
        self._objects = 0
        self._used_bytes = 0
        self._listed_up_to: str | None = ""

    def listed(self, found: Iterable[tuple[str, int | None]]) -> bool:
        """Add a page: names in their order, with the size of what is ours. Whether more is wanted."""
        for path, size_bytes in found:
            self._listed_up_to = path
            if size_bytes is not None:
                self._add(1, size_bytes)
        return self._objects < MOST_LISTED

    def listing_ended(self) -> None:
        """The listing has reached the end, or will go no further."""
        self._listed_up_to = None

    def stored(self, path: str, size_bytes: int) -> None:
        """Count an object that was not there before."""
        if self._is_counted(path):
            self._add(1, size_bytes)

    def removed(self, path: str, size_bytes: int) -> None:
        """Count an object no longer."""
        if self._is_counted(path):
            self._add(-1, -size_bytes)

    def usage(self) -> BackendUsage:
        """What is counted now."""
        return BackendUsage(self._objects, self._used_bytes)

    def _is_counted(self, path: str) -> bool:
        return self._listed_up_to is None or path <= self._listed_up_to

    def _add(self, objects: int, size_bytes: int) -> None:
        """Add, or take away; what others have stored, and we delete, was never counted."""
        self._objects = max(0, self._objects + objects)
        self._used_bytes = max(0, self._used_bytes + size_bytes) if self._objects else 0
