"""What a namespace holds, known without asking: a count of all its objects now and then, and what we change meanwhile.

What others store and remove, and what the server evicts or lets expire, shows in the next count. Pure.
"""

from async_cache.prompt.keys import ObjectKey
from async_cache.values import BackendUsage


class Usage:
    """The totals, and the count that goes on, if one does.

    A count sees what we change while it goes on, or not: of that, what we did ourselves is believed. An object that we
    remove after it was seen is counted until the next time.
    """

    def __init__(self) -> None:
        self._objects = 0
        self._used_bytes = 0
        self._changed: dict[ObjectKey, int] | None = None  # sizes, 0 for what was removed; None between two counts
        self._seen_objects = 0
        self._seen_bytes = 0

    def now(self) -> BackendUsage:
        """The totals as far as they are known."""
        return BackendUsage(self._objects, self._used_bytes)

    def stored(self, key: ObjectKey, size_bytes: int) -> None:
        """An object was not there, and is now."""
        self._objects += 1
        self._used_bytes += size_bytes
        if self._changed is not None:
            self._changed[key] = size_bytes

    def removed(self, key: ObjectKey, size_bytes: int) -> None:
        """An object was there, and is not now."""
        self._objects = max(0, self._objects - 1)
        self._used_bytes = max(0, self._used_bytes - size_bytes)
        if self._changed is not None:
            self._changed[key] = 0

    def begin_count(self) -> None:
        """Count all anew."""
        self._changed = {}
        self._seen_objects = self._seen_bytes = 0

    def see(self, key: ObjectKey, size_bytes: int) -> None:
        """The count has come to an object."""
        if self._changed is not None and key not in self._changed:
            self._seen_objects += 1
            self._seen_bytes += size_bytes

    def end_count(self, *, complete: bool) -> None:
        """Take over what was counted, if it was all."""
        changed, self._changed = self._changed, None
        if complete and changed is not None:
            sizes = [size_bytes for size_bytes in changed.values() if size_bytes]
            self._objects = self._seen_objects + len(sizes)
            self._used_bytes = self._seen_bytes + sum(sizes)
