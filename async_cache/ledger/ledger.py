"""The ledger: which chunk left which tier, when and why, and whether something else was built on it.

It is told in the step in which something leaves, so that a miss is explained at once. What left a backend is told to
observers from here: a chunk once, however many of its objects go one by one.
"""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from itertools import groupby
from struct import Struct as Packing
from typing import Any

from blake3 import blake3
from msgspec import Struct

from async_cache.ledger.expiries import Expiries
from async_cache.ledger.table import Table
from async_cache.observe import Observers, notify
from async_cache.values import Removal

_VALUE = Packing("<8s8sIBBH")  # child, owner, moment, removal, place, marks
_HOW = Packing("<IBBH")  # the end of that: how it left
_NUMBER_AT = 20  # in a value
_NO_CHILD = UNKNOWN_OWNER = bytes(8)
_Record = tuple[bytes, bytes, int, int, int, int]
_NOTHING: _Record = (_NO_CHILD, UNKNOWN_OWNER, 0, 0, 0, 0)
_FORKED = 1 << 15  # among the marks; the others say which places a chunk has left since it was stored there
_L1 = 0
_MOST_PLACES = 256
_TICKS = 16  # in a second
_LAST = 2**32 - 1  # in eight years
REMOVALS = tuple(Removal)
_number = REMOVALS.index  # to hash a member of an enum is a call, in Python 3.11
_EXPIRED, _LOST = Removal.EXPIRED, Removal.LOST
_MOST_TAGS = 4096


class Left(Struct, frozen=True):
    """What is remembered of a chunk that left: why, from where (None: L1), and when."""

    removal: Removal
    backend: str | None
    seconds_ago: float


class Ledger:
    """Remembers the last `capacity` chunks that left a tier, in 40 bytes each; with 0, none.

    `owner_of` tells whose a chunk of L1 is. Of a salt only a tag is kept, which nobody else can make.
    """

    def __init__(
        self,
        capacity: int = 0,
        observers: Observers | None = None,
        owner_of: Callable[[bytes], str | None] = lambda chunk_hash: None,
    ):
        self._table = Table(capacity)
        self._observers = observers if observers is not None else Observers()
        self._owner_of = owner_of
        self._places: list[str | None] = [None]
        self._numbers: dict[str, int] = {}
        self._backends = 0
        self._tags: dict[str, bytes] = {}
        self._secret = secrets.token_bytes(32)
        self._clock = asyncio.get_running_loop().time if capacity else float
        self._began = self._clock()
        self._expiries = Expiries(capacity, self._expired)

    def close(self) -> None:
        """Forget everything, and remember nothing more."""
        self._table = Table(0)
        self._expiries.close()

    def tag(self, salt: str) -> bytes:
        """What stands for a salt: 8 bytes, never all of them 0."""
        tag = self._tags.get(salt)
        if tag is None:
            if len(self._tags) >= _MOST_TAGS:
                self._tags.clear()
            digest = blake3(salt.encode(), key=self._secret).digest(8)
            tag = self._tags[salt] = digest[:7] + bytes([digest[7] | 1])
        return tag

    # What happens.

    def left_l1(self, chunk_hash: bytes, owner: str, child: bytes | None, forked: bool, removal: Removal) -> None:
        """A chunk has left L1, where `child`, if any, was built on it, and more than one if it has `forked`."""
        if not self._table:
            return
        now, number, place = self._now(), _number(removal), _L1
        at, (first, _, moment, before, where, marks) = self._record(chunk_hash)
        if at >= 0:
            if child is None or first == child[:8]:
                child = first
            elif first != _NO_CHILD:
                forked = True
            refused = before == _number(Removal.REFUSED) and removal is Removal.CAPACITY
            if moment > now or refused:  # it is to expire elsewhere, or is nowhere since a backend did not admit it
                now, number, place = moment, before, where
        self._put(chunk_hash, at, child or _NO_CHILD, self.tag(owner), now, number, place, marks | forked * _FORKED)

    def left(self, backend: str, chunk_hash: bytes, removal: Removal) -> None:
        """A chunk cannot be loaded from a backend any more: all of it, or some of its objects."""
        place = self._place(backend)
        mark = _mark(place)
        at, (first, owner, moment, before, where, marks) = self._record(chunk_hash)
        if marks & mark:
            return  # that was told already
        now = self._now()
        if removal is _LOST and where == place and before == _number(_EXPIRED) and moment <= now:
            removal, now = _EXPIRED, moment
        if owner == UNKNOWN_OWNER:
            owner = self._owner(chunk_hash)
        number = _number(removal)
        if moment > now and where != place:  # it is to expire elsewhere
            now, number, place = moment, before, where
        self._put(chunk_hash, at, first, owner, now, number, place, marks | mark)
        if self._observers.left:
            notify(self._observers.left, backend, chunk_hash, removal, owner)

    def refused(self, backend: str, chunk_hash: bytes) -> None:
        """A backend has not admitted a chunk: if others have not got it either, this is why it is nowhere later."""
        if self._table:
            at, (first, owner, _, _, _, marks) = self._record(chunk_hash)
            if owner == UNKNOWN_OWNER:
                owner = self._owner(chunk_hash)
            number = _number(Removal.REFUSED)
            self._put(chunk_hash, at, first, owner, self._now(), number, self._place(backend), marks)

    def stored(self, backend: str, chunk_hash: bytes, ttl_seconds: float | None = None) -> None:
        """A chunk may be in a backend again, where it expires after so many seconds."""
        place = self._place(backend)
        at, (first, owner, moment, number, where, marks) = self._record(chunk_hash)
        marks &= ~_mark(place)
        if ttl_seconds is not None:
            if owner == UNKNOWN_OWNER:
                owner = self._owner(chunk_hash)
            expires = min(self._now() + int(ttl_seconds * _TICKS), _LAST)
            if moment <= expires or where == place:  # else it expires elsewhere, later
                moment, number, where = expires, _number(_EXPIRED), place
            self._put(chunk_hash, at, first, owner, moment, number, where, marks)
            if self._observers.left:
                self._expiries.add(self._began + (expires + 1) / _TICKS, backend, chunk_hash)
        elif at >= 0:
            self._change(at, first, owner, moment, number, where, marks)

    def _expired(self, backend: str, chunk_hash: bytes) -> None:
        self.left(backend, chunk_hash, _EXPIRED)

    def closed(self, backend: str) -> None:
        """A backend is closed. Another one of its name, which has what it has, may leave chunks once more."""
        self._numbers.pop(backend, None)

    def built_on(self, parent: bytes, child: bytes) -> None:
        """A chunk was committed that builds on one that L1 has not."""
        at, (first, owner, moment, number, place, marks) = self._record(parent)
        if at >= 0:
            forks = first not in (_NO_CHILD, child[:8])
            self._change(at, child[:8], owner, moment, number, place, marks | forks * _FORKED)

    # What is known.

    def find(self, chunk_hash: bytes) -> Left | None:
        """What is remembered of a chunk that is not there; None if it never was, or longer ago than is remembered."""
        return self.find_all((chunk_hash,))[0]

    def find_all(self, chunk_hashes: Sequence[bytes]) -> list[Left | None]:
        """What is remembered of each of these chunks: the same object for those side by side that left alike."""
        now, places = self._now(), self._places
        found: list[Left | None] = []
        for _, same in groupby(self._table.find_tails(chunk_hashes, _HOW.size), id):
            how, *others = same
            left = None
            if how is not None:
                moment, number, place, _ = _HOW.unpack(how)
                removal = REMOVALS[number] if moment <= now else _LOST  # before its time
                left = Left(removal, places[place], max(0, now - moment) / _TICKS)
            found += [left] * (1 + len(others))
        return found

    def number(self, chunk_hash: bytes) -> int:
        """Which of `REMOVALS` it was that a chunk left for; -1 where `find` says None."""
        at = self._table.find(chunk_hash)
        if at < 0:
            return -1
        number = self._table.data[at + _NUMBER_AT]
        if REMOVALS[number] is _EXPIRED and (left := self.find(chunk_hash)) is not None:
            return _number(left.removal)
        return number

    def has_other_child(self, parent: bytes, child: bytes) -> bool:
        """Whether something else than `child` was built on a chunk that left."""
        table = self._table
        at = table.find(parent)
        if at < 0:
            return False
        first, _, _, _, _, marks = _VALUE.unpack_from(table.data, at)
        return marks & _FORKED > 0 or first not in (_NO_CHILD, child[:8])

    def _now(self) -> int:
        return int((self._clock() - self._began) * _TICKS)

    def _owner(self, chunk_hash: bytes) -> bytes:
        salt = self._owner_of(chunk_hash)
        return self.tag(salt) if salt is not None else UNKNOWN_OWNER

    def _record(self, chunk_hash: bytes) -> tuple[int, _Record]:
        """Where the record of a chunk is, and what is in it; -1 and nothing where there is none."""
        at = self._table.find(chunk_hash)
        return at, _VALUE.unpack_from(self._table.data, at) if at >= 0 else _NOTHING

    def _put(self, chunk_hash: bytes, at: int, *record: Any) -> None:
        """Remember a chunk, as the newest one; `at`: where its record was."""
        self._table.put(chunk_hash, _VALUE.pack(*record), at)

    def _change(self, at: int, *record: Any) -> None:
        """Know better of a chunk that is remembered."""
        _VALUE.pack_into(self._table.data, at, *record)

    def _place(self, backend: str) -> int:
        """The number of a backend. Beyond so many names, the oldest lend theirs."""
        place = self._numbers.get(backend)
        if place is None:
            place = self._numbers[backend] = 1 + self._backends % (_MOST_PLACES - 1)
            self._backends += 1
            self._places[place : place + 1] = [backend]
        return place


def _mark(place: int) -> int:
    """The bit that says that a chunk has left a backend. Fifteen have one of their own."""
    return 1 << (place - 1) % 15
