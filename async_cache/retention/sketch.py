"""How often digests were seen of late, in little memory: nothing of what was seen is kept, and nothing is undercounted.

A count-min sketch whose counters are halved again and again, as in TinyLFU (Einziger, Friedman and Manes: "TinyLFU: a
highly efficient cache admission policy", ACM Transactions on Storage 13, 2017).
"""

from struct import Struct

_ROWS = Struct("<4I")  # the first bytes of a digest are as good as four hashes of it
_WIDTH_BITS = 19
_PERIOD = 1 << _WIDTH_BITS - 2  # what was seen between two halvings: few enough that hardly any digests share all cells
_MOST = 255
_HALF = bytes(count // 2 for count in range(_MOST + 1))


class Sketch:
    """Counts of digests, in 2 MiB. Every 131,072 of them all counts are halved: what was seen long ago is forgotten."""

    def __init__(self) -> None:
        self._cells = bytearray(_ROWS.size // 4 << _WIDTH_BITS)
        self._seen = 0

    @property
    def content(self) -> bytes:
        """All counts, as bytes; others may be set. Raises ValueError for what is none."""
        return bytes(self._cells)

    @content.setter
    def content(self, cells: bytes) -> None:
        if len(cells) != len(self._cells):
            raise ValueError("these are other counts")
        self._cells = bytearray(cells)

    def add(self, digest: bytes) -> int:
        """Count a digest of 16 bytes or more; how often it was seen, this time included."""
        cells, places = self._cells, _places(digest)
        count = min([cells[place] for place in places])
        if count < _MOST:
            count += 1
            for place in places:
                if cells[place] < count:
                    cells[place] = count
        self._seen += 1
        if self._seen >= _PERIOD:
            self._cells = cells.translate(_HALF)
            self._seen = 0
        return count

    def count(self, digest: bytes) -> int:
        """How often a digest was seen of late."""
        cells = self._cells
        return min([cells[place] for place in _places(digest)])


def _places(digest: bytes) -> tuple[int, int, int, int]:
    mask = (1 << _WIDTH_BITS) - 1
    a, b, c, d = _ROWS.unpack_from(digest)
    width = mask + 1
    return a & mask, width + (b & mask), 2 * width + (c & mask), 3 * width + (d & mask)
