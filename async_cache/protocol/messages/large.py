"""Large requests: what takes long to decode is not decoded in one step.

A tenth of a microsecond goes to each item of a list, and a frame has room for millions of them; to find out that a text
is too long takes as long as to read it. So the values of a large request are walked over before they are decoded. What
that does not end soon is `Large`: to be read by a thread, which takes its long lists out and decodes them in slices.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from async_cache.errors import ProtocolError
from async_cache.protocol.messages.base import MAX_CHUNKS, MAX_LAYOUT_BYTES, Index, Message
from async_cache.protocol.messages.prompts import Blocks, EngineDigests, SegmentIds, TokenIds
from async_cache.protocol.messages.requests import RegisterLayout, Request, StoreData

LARGE_BYTES = 65_536
"""A payload of so many bytes is decoded in any case: in a millisecond or two."""
_OF_DATA, _OF_LAYOUT = StoreData.__name__, RegisterLayout.__name__
_TEXT_BYTES = 4096  # of the longest text that a request may have
_FEW_VALUES = 2048  # that are walked over at once, in half a millisecond
_MOST_VALUES = 4096  # of every array but a long list: no field has more
_FEW_ITEMS = 256  # in a list that stays where it is
_MOST_ITEMS = 2 * MAX_CHUNKS  # in the lists of a request, together
_SLICE = 1024  # items
_FIXED = [1] * 0xC4 + [0] * 6 + [5, 9, 2, 3, 5, 9, 2, 3, 5, 9] + [0] * 12 + [1] * 32  # bytes of a value, by its first
_FIXED[0x80:0xC4] = [0] * 32 + [1 + n for n in range(32)] + [1, 0, 1, 1]
_WIDTHS = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}  # of the length that follows
_BIN, _PAIR = 0xC4, 0x92
_LISTS: Mapping[type[Message], tuple[str, int]] = {
    TokenIds: ("media", 2**14),
    SegmentIds: ("media", 2**14),
    Blocks: ("blocks", MAX_CHUNKS),
    EngineDigests: ("digests", MAX_CHUNKS),
}
"""The list of each form of a prompt, and how many items it has at the most."""
_bytes = msgspec.msgpack.Decoder(list[bytes])
_pairs = msgspec.msgpack.Decoder(list[tuple[Index, bytes]])
_requests = msgspec.msgpack.Decoder(Request)


class Large(NamedTuple):
    """A request that is not read yet, and so has no number."""

    payload: bytes | memoryview
    number: int = 0


def is_quick(payload: bytes | memoryview) -> bool:
    """Whether a request of more than LARGE_BYTES is decoded in a millisecond or two.

    Raises ProtocolError for one that may not be so large, or that cannot be a request.
    """
    walk = _Walk(payload, _FEW_VALUES)
    name = walk.name()
    if name == _OF_DATA:
        return True
    if name == _OF_LAYOUT:
        if len(payload) > MAX_LAYOUT_BYTES:
            raise ProtocolError(f"not a message: a layout of more than {MAX_LAYOUT_BYTES} bytes")
        return True
    try:
        walk.fields()
    except _TakesLong:
        return False
    if not walk.prompts:
        raise ProtocolError(f"not a message: {len(payload)} bytes of {name}")
    return True


def decode_in_slices(large: Large) -> Any:
    """The request, in many short steps: for a thread. Raises ProtocolError, whatever the bytes are."""
    walk = _Walk(large.payload)
    walk.name()
    walk.fields()
    try:
        message: Any = _requests.decode(walk.without_lists())
        prompts = getattr(message, "prompts", None) or [message.prompt]
        for number, (begin, ends) in walk.lists.items():
            _put(prompts[number], list(_items(large.payload, begin, ends)))
    except (msgspec.DecodeError, UnicodeDecodeError, AttributeError, LookupError, ValueError) as error:
        raise ProtocolError(f"not a message: {error}"[:300]) from error
    return message


def _items(data: bytes | memoryview, begin: int, ends: Sequence[int]) -> Iterator[Any]:
    decode: Callable[[bytes], list[Any]] = (_bytes if data[begin] >= _BIN else _pairs).decode
    for first in range(0, len(ends), _SLICE):
        some = ends[first : first + _SLICE]
        yield from decode(b"\xdc" + len(some).to_bytes(2, "big") + data[begin : some[-1]])
        begin = some[-1]


def _put(prompt: Message, items: list[Any]) -> None:
    name, most = _LISTS[type(prompt)]
    if len(items) > most or isinstance(items[0], bytes) is (name == "media"):
        raise ValueError(f"{len(items)} of {name}")
    setattr(prompt, name, items)


class _TakesLong(Exception):
    """There are more values than are walked over at once."""


class _Walk:
    """Walks over the values of a request. `lists`: by the prompt, where the items of its long list begin and end."""

    def __init__(self, data: bytes | memoryview, patience: int | None = None):
        self.prompts = 0
        self.lists: dict[int, tuple[int, Sequence[int]]] = {}
        self._data = data
        self._at = 0
        self._patience = patience
        self._fields = 0
        self._items = 0
        self._kept: list[bytes | memoryview] = []
        self._kept_until = 0

    def name(self) -> str:
        """The name of the message."""
        self._fields = self._array(_MOST_VALUES) - 1
        begin = self._at
        self._value()
        return bytes(self._data[begin : self._at][-64:]).decode(errors="replace").lstrip("\ufffd")

    def fields(self) -> None:
        """Go on to the end. Raises ProtocolError for what no request has, and _TakesLong."""
        for _ in range(self._fields):
            if not self._is_array():
                self._value()
                continue
            count = self._array(_MOST_VALUES)
            if not count or not (self._is_array() or self._is_text()):
                self._few(count)
            elif self._is_text():
                self._prompt(count)
            else:
                for _ in range(count):
                    self._prompt(self._array(_MOST_VALUES))
        if self._at != len(self._data):
            raise ProtocolError("not a message: there is more than one")

    def without_lists(self) -> bytes:
        """The request, with empty lists in the place of the long ones."""
        return b"".join((*self._kept, self._data[self._kept_until :]))

    def _prompt(self, count: int) -> None:
        for _ in range(count):
            if self._is_array():
                self._list()
            else:
                self._value()
        self.prompts += 1

    def _list(self) -> None:
        begin, count = self._at, self._array(_MOST_ITEMS)
        if count <= _FEW_ITEMS:
            for _ in range(count):
                self._item()
            return
        if self._patience is not None:
            raise _TakesLong
        self._items += count
        if self._items > _MOST_ITEMS or self.prompts in self.lists:
            raise ProtocolError(f"not a message: lists of more than {_MOST_ITEMS} items")
        first = self._at
        self.lists[self.prompts] = first, self._ends_of_equal(count) or self._ends(count)
        if self._at > len(self._data):
            raise ProtocolError("not a message: it ends too early")
        self._kept += self._data[self._kept_until : begin], b"\x90"
        self._kept_until = self._at

    def _ends_of_equal(self, count: int) -> Sequence[int]:
        """Where the items of a list end that are bytes, all of one size; none if they are not."""
        data, first = self._data, self._at
        size = 2 + data[first + 1] if first + 1 < len(data) else 0
        last = first + count * size
        if data[first] != _BIN or last > len(data):
            return ()
        kinds, sizes = bytes(data[first:last:size]), bytes(data[first + 1 : last : size])
        if kinds != kinds[:1] * count or sizes != sizes[:1] * count:
            return ()
        self._at = last
        return range(first + size, last + 1, size)

    def _ends(self, count: int) -> Sequence[int]:
        """Where the items of a list end."""
        data, at, ends = self._data, self._at, list[int]()
        try:
            for _ in range(count):
                kind = data[at]
                if kind == _BIN:
                    at += 2 + data[at + 1]
                elif kind == _PAIR and (size := _FIXED[data[at + 1]]) and data[at + 1 + size] == _BIN:
                    at += 1 + size
                    at += 2 + data[at + 1]
                else:
                    self._at = at
                    self._item()
                    at = self._at
                ends.append(at)
        except IndexError as error:
            raise ProtocolError("not a message: it ends too early") from error
        self._at = at
        return ends

    def _item(self) -> None:
        self._few(self._array(2) if self._is_array() else 1)

    def _few(self, count: int) -> None:
        for _ in range(count):
            self._value()

    def _is_array(self) -> bool:
        return 0x90 <= self._first() < 0xA0 or self._first() in (0xDC, 0xDD)

    def _is_text(self) -> bool:
        return 0xA0 <= self._first() < 0xC0 or self._first() in (0xD9, 0xDA, 0xDB)

    def _first(self) -> int:
        if self._at >= len(self._data):
            raise ProtocolError("not a message: it ends too early")
        return self._data[self._at]

    def _array(self, most: int) -> int:
        """How many values an array has, up to so many."""
        kind = self._first()
        self._at += 1
        if 0x90 <= kind < 0xA0:
            count = kind & 15
        elif kind in (0xDC, 0xDD):
            count = self._length(2 if kind == 0xDC else 4)
        else:
            raise ProtocolError("not a message: an array is missing")
        if count > most:
            raise ProtocolError(f"not a message: an array of {count} values")
        return count

    def _length(self, width: int) -> int:
        begin, self._at = self._at, self._at + width
        return int.from_bytes(self._data[begin : self._at], "big")

    def _value(self) -> None:
        """Walk over a value that is no array."""
        if self._patience is not None:
            self._patience -= 1
            if self._patience < 0:
                raise _TakesLong
        kind = self._first()
        if size := _FIXED[kind]:
            self._at += size
        elif width := _WIDTHS.get(kind):
            self._at += 1
            size = self._length(width)
            if kind > 0xC6 and size > _TEXT_BYTES:
                raise ProtocolError(f"not a message: a text of {size} bytes")
            self._at += size
        else:
            raise ProtocolError("not a message: it has a value that none has")
        if self._at > len(self._data):
            raise ProtocolError("not a message: it ends too early")
