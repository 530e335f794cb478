"""The backends of a cache, which may come and go while it is open."""

import asyncio
from collections.abc import Iterator, Sequence

from async_cache.errors import ConfigError
from async_cache.l2.guard.guard import Guard
from async_cache.l2.placement import Placing
from async_cache.prompt.keys import ObjectKey
from async_cache.values import BackendState


async def held_by(guards: Sequence[Guard], keys: Sequence[ObjectKey]) -> set[ObjectKey]:
    """Which of these objects some backend holds, as far as they can say and read them. No pin stays."""
    held: set[ObjectKey] = set()
    for guard, found in zip(guards, await ask_all(guards, keys), strict=True) if keys else ():
        if found is not None:
            guard.unpin_found(keys, found)
            held.update(key for key, there in zip(keys, found, strict=True) if there and key not in guard.faults)
    return held


async def ask_all(guards: Sequence[Guard], keys: Sequence[ObjectKey], owner: str = "") -> list[list[bool] | None]:
    """What each of these holds, pinned, asked side by side; see `Guard.lookup`. Cancelled, it keeps no pin."""
    lookups = [asyncio.create_task(guard.lookup(keys, owner)) for guard in guards]
    try:
        if lookups:
            await asyncio.wait(lookups)
        return [lookup.result() for lookup in lookups]
    except BaseException:
        for guard, lookup in zip(guards, lookups, strict=True):
            unpin_answer(guard, lookup, keys)
        raise


def unpin_answer(guard: Guard, lookup: "asyncio.Task[list[bool] | None]", keys: Sequence[ObjectKey]) -> None:
    """Cancel a lookup of which nobody wants the answer any more, and give back what it finds, or has found."""

    def answered(lookup: "asyncio.Task[list[bool] | None]") -> None:
        found = None if lookup.cancelled() or lookup.exception() else lookup.result()
        if found is not None:
            guard.unpin_found(keys, found)

    lookup.cancel()
    lookup.add_done_callback(answered)


class Guards:
    """Which backends there are, the fastest first.

    `current` is replaced, and never changed: a lookup asks those that were there when it began, and what it found is
    loaded from them. One that is removed is in `leaving` from the moment when no lookup asks it any more until it is
    closed.
    """

    def __init__(self, guards: Sequence[Guard] = ()):
        self.current: tuple[Guard, ...] = tuple(guards)
        self.leaving: tuple[Guard, ...] = ()

    def __iter__(self) -> Iterator[Guard]:
        """All that are not closed yet."""
        return iter((*self.current, *self.leaving))

    def find(self, name: str) -> Guard:
        """The backend of this name. Raises ConfigError."""
        for guard in self:
            if guard.name == name:
                return guard
        names = ", ".join(guard.name for guard in self.current)
        raise ConfigError(f"there is no backend {name!r}: there is {names or 'none'}")

    def others(self, guard: Guard) -> list[Guard]:
        """Those beside this one that are to stay."""
        return [other for other in self.current if other is not guard and other.state is BackendState.ACTIVE]

    def before(self, guard: Guard) -> Sequence[Guard]:
        """Those that are faster than this one; none where it has left."""
        return self.current[: self.current.index(guard)] if guard in self.current else ()

    def behind(self, guard: Guard) -> Sequence[Guard]:
        """Those that are slower than this one; none where it has left."""
        return self.current[self.current.index(guard) + 1 :] if guard in self.current else ()

    def add(self, guard: Guard, behind: Sequence[Guard] = ()) -> None:
        """Let one be asked from now on, before the first of these that is there still; behind all if none is."""
        at = next((at for at, other in enumerate(self.current) if other in behind), len(self.current))
        self.current = (*self.current[:at], guard, *self.current[at:])

    def leave(self, guard: Guard) -> None:
        """Let one be asked no more."""
        guard.state = BackendState.LEAVING
        self.current = tuple(other for other in self.current if other is not guard)
        self.leaving += (guard,)

    def left(self, guard: Guard) -> None:
        """Forget one that is closed."""
        self.leaving = tuple(other for other in self.leaving if other is not guard)

    def stages(self) -> tuple[list[Guard], list[Guard]]:
        """Those that what is committed is written to at once, and those that have a turn after that, in its order.

        FIRST comes at once where nobody before it would be written to, and else before SKIP_IF_PRESENT.
        """
        at_once: list[Guard] = []
        first: list[Guard] = []
        skip: list[Guard] = []
        for guard in self.current:
            write = guard.backend.placement.write if guard.state is BackendState.ACTIVE else Placing.NONE
            if write is Placing.ALL or (write is Placing.FIRST and not at_once):
                at_once.append(guard)
            elif write is Placing.FIRST:
                first.append(guard)
            elif write is Placing.SKIP_IF_PRESENT:
                skip.append(guard)
        return at_once, [*first, *skip]

    def __repr__(self) -> str:
        return f"<Guards of {', '.join(guard.name for guard in self.current) or 'nothing'}>"
