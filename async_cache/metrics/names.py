"""Which names are shown, and which are "other": clients may make up any number of them."""

from collections.abc import Mapping

OTHER = "other"
_MAX_LENGTH = 128
_MUCH_MORE = 2  # so much more than the least of those that are shown, before it takes its place


class Names:
    """Those of one kind that are shown by their names: as many as `limit`, the ones with the most traffic of late."""

    def __init__(self, limit: int):
        self._limit = limit
        self._shown: set[str] = set()

    def show(self, name: str) -> str:
        """How a name is shown. A new one is, while there is room."""
        name = name[:_MAX_LENGTH]
        if name in self._shown:
            return name
        if len(self._shown) < self._limit and name != OTHER:
            self._shown.add(name)
            return name
        return OTHER

    def rank(self, traffic: Mapping[str, float]) -> bool:
        """Show those with much more traffic than the least of those that are shown, in its place; whether any is.

        While there is room, nobody has to go.
        """
        if len(self._shown) < self._limit:
            return False
        most = sorted(((size, name) for name, size in traffic.items() if name not in self._shown), reverse=True)
        changed = False
        for size, name in most:
            least = min(self._shown, key=lambda shown: traffic.get(shown, 0.0))
            if name == OTHER or size <= _MUCH_MORE * traffic.get(least, 0.0):
                break
            self._shown.remove(least)
            self._shown.add(name)
            changed = True
        return changed
