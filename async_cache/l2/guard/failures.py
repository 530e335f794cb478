"""Failures of calls in a row: those of an object that fails alone are told from those of a backend."""

from collections.abc import Iterable

from async_cache.prompt.keys import ObjectKey


class Failures:
    """Calls of one kind that failed since one of that kind succeeded; their number is that of different ones.

    When a call brings nothing, the backend may be at fault, or the objects that were asked for. If the same is asked
    and fails again, that is no news: what fails by itself is one reason to leave its backend alone, however often it
    is asked for. A backend that is dead has another reason with each call about something else.
    """

    def __init__(self) -> None:
        self._asked: list[frozenset[ObjectKey]] = []

    def __len__(self) -> int:
        return len(self._asked)

    def add(self, keys: Iterable[ObjectKey], most: int) -> None:
        """Take note of a call about these objects that failed; about none, if its failure says nothing of them.

        No more than `most` are counted: the backend is left alone by then.
        """
        asked = frozenset(keys)
        if len(self._asked) < most and (not asked or asked not in self._asked):
            self._asked.append(asked)
