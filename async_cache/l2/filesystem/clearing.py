"""What was given up is cleared: single bodies become holes, and segments that have none any more are removed.

It blocks: for the thread that changes the directory. What could not be done is done later.
"""

import os
import time
from collections.abc import Collection, Sequence

from msgspec import Struct

from async_cache.l2.filesystem.bodies import Bodies
from async_cache.l2.filesystem.files import NO_FILE, Files, open_file
from async_cache.l2.filesystem.format import PAGE_BYTES

AGAIN_SECONDS = 5.0  # after what has failed twice


class Hole(Struct, eq=False):
    """Pages of a segment that are to be cleared, and the record that says so. `is_last`: it has no other body."""

    segment: str
    page: int
    end: int
    record: bytes
    is_last: bool


_Pages = tuple[str, int, int]  # of a segment, the first one and the end


class Clearing:
    """Clears the segments of an open directory."""

    def __init__(self, directory: int, files: Files, bodies: Bodies):
        self._directory, self._files, self._bodies = directory, files, bodies
        self._unremoved: set[str] = set()
        self._uncleared: list[_Pages] = []
        self._again_at = 0.0

    @property
    def has_failed(self) -> bool:
        """Whether something that was given up is still there."""
        return bool(self._unremoved or self._uncleared)

    @property
    def left_bytes(self) -> int:
        """The room of what could not be cleared."""
        return sum(end - begin for _, begin, end in self._uncleared) * PAGE_BYTES

    def clear(self, holes: Sequence[Hole], emptied: Collection[str]) -> None:
        """Clear these, and what could not be cleared before. Raises OSError if one of these could not be."""
        if self.has_failed and time.monotonic() >= self._again_at:
            self.try_again()
        left = [hole for hole in holes if hole.segment not in emptied]
        empty = {hole.segment for hole in left if hole.is_last and not self._bodies.puncher.makes_holes}
        places = [(hole.segment, hole.page, hole.end) for hole in left]
        for fault in (self._remove_all(emptied), self._clear_all(places, empty)):
            if fault is not None:
                raise fault

    def put_off(self, holes: Sequence[Hole], emptied: Collection[str]) -> None:
        """Clear these another time."""
        self._unremoved.update(emptied)
        self._uncleared += [(hole.segment, hole.page, hole.end) for hole in holes if hole.segment not in emptied]
        self._again_at = time.monotonic() + AGAIN_SECONDS

    def try_again(self) -> None:
        """Clear what could not be cleared before."""
        unremoved, self._unremoved = self._unremoved, set()
        uncleared, self._uncleared = self._uncleared, []
        self._remove_all(unremoved)
        self._clear_all(uncleared)
        self._again_at = time.monotonic() + AGAIN_SECONDS if self.has_failed else 0.0

    def _remove_all(self, names: Collection[str]) -> OSError | None:
        """Remove segments; why not, if one could not be."""
        fault = None
        for name in names:
            try:
                self.remove(name)
            except OSError as error:
                self._unremoved.add(name)
                fault = error.with_traceback(None)  # whoever keeps it would keep the file open
        return fault

    def _clear_all(self, places: list[_Pages], empty: Collection[str] = ()) -> OSError | None:
        """Clear pages, those that lie side by side by one call; why not, if some could not be.

        Segments that are `empty` and can have no holes are cut to nothing: whoever answers for them may do nothing for
        long, and has still to remove them.
        """
        fault = None
        left = sorted(places, reverse=True)
        while left:
            segment, begin, end = left.pop()
            while left and left[-1][0] == segment and left[-1][1] == end:
                end = left.pop()[2]
            try:
                if segment in empty:
                    self._bodies.cut(segment)
                else:
                    self._bodies.clear(segment, begin, end)
            except OSError as error:
                self._uncleared.append((segment, begin, end))
                fault = error.with_traceback(None)
        return fault

    def remove(self, name: str) -> None:
        """Remove a file, and its bytes even where others have it open. Raises OSError where these are still there."""
        self._files.forget(name)
        try:
            file = open_file(self._directory, name)
            os.truncate(file.fd, 0)
        except OSError as error:
            if error.errno in NO_FILE:
                return  # what is no file is not ours
            raise
        try:
            os.unlink(name, dir_fd=self._directory)
        except OSError as error:
            if error.errno not in NO_FILE:
                self._unremoved.add(name)

    def set_aside(self, name: str) -> None:
        """Give a file a name that nobody reads, nor removes. Raises OSError."""
        os.rename(name, f"{name}.bad", src_dir_fd=self._directory, dst_dir_fd=self._directory)
        self._files.forget(name)
