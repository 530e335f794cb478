"""Backends that make another one wait, slow down, fail or rot, to see in a test what its caller does then.

They can wrap each other. What they do, they do before the inner call: a call that is cancelled there has pinned nothing
and touched no buffer. They use the loop's clock and no threads, so they run in virtual time.
"""

import asyncio
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Literal, get_args

from async_cache.errors import BackendError
from async_cache.l2.backend import Backend, Loaded, LoadOutcome, Room, not_told
from async_cache.l2.memory import STEP_BYTES, MemoryBackend
from async_cache.l2.wrapper import Wrapper
from async_cache.prompt.keys import ObjectKey

Verb = Literal["lookup", "load", "store", "delete"]
VERBS: tuple[Verb, ...] = get_args(Verb)

Buffers = Sequence[memoryview]


class WrappedBackend(Wrapper):
    """A backend that hands everything on to `inner`, with its name, limits and placement, and counts by verb.

    `calls` are those that have begun, `keys_asked` the keys in them. It never answers a lookup at once, since nothing
    could be done before that.
    """

    def __init__(self, inner: Backend):
        super().__init__(inner)
        self.calls: Counter[str] = Counter()
        self.keys_asked: Counter[str] = Counter()

    async def before(self, verb: Verb, keys: Sequence[ObjectKey], buffers: Buffers) -> None:
        """Wait, or raise, before an inner call: for subclasses. `calls` counts the call already."""

    async def lookup(self, keys: Sequence[ObjectKey]) -> list[bool]:
        await self._begin("lookup", keys)
        return await super().lookup(keys)

    async def load(self, keys: Sequence[ObjectKey], buffers: Buffers) -> list[LoadOutcome]:
        await self._begin("load", keys, buffers)
        return await super().load(keys, buffers)

    async def load_each(self, keys: Sequence[ObjectKey], buffers: Buffers, loaded: Loaded) -> list[LoadOutcome]:
        await self._begin("load", keys, buffers)
        return await super().load_each(keys, buffers, loaded)

    async def load_sized(self, keys: Sequence[ObjectKey], buffers: Buffers) -> list[int | LoadOutcome]:
        await self._begin("load", keys, buffers)
        return await super().load_sized(keys, buffers)

    async def load_listed(
        self, keys: Sequence[ObjectKey], sizes: Sequence[int], room: Room
    ) -> list[memoryview | LoadOutcome]:
        await self._begin("load", keys)
        return await super().load_listed(keys, sizes, room)

    async def store(self, keys: Sequence[ObjectKey], buffers: Buffers) -> list[bool]:
        await self._begin("store", keys, buffers)
        return await super().store(keys, buffers)

    async def delete(self, keys: Sequence[ObjectKey]) -> int:
        await self._begin("delete", keys)
        return await super().delete(keys)

    async def _begin(self, verb: Verb, keys: Sequence[ObjectKey], buffers: Buffers = ()) -> None:
        self.calls[verb] += 1
        self.keys_asked[verb] += len(keys)
        await self.before(verb, keys, buffers)


class GatedBackend(WrappedBackend):
    """A backend whose calls of the held verbs wait at a gate until it is released.

    With `stubborn`, a load or store that is cancelled at the gate ends only when the gate is released, and raises
    CancelledError then: like a thread on a dead disk, it owns its buffers until it ends.
    """

    def __init__(self, inner: Backend, *verbs: Verb, stubborn: bool = False):
        super().__init__(inner)
        self._stubborn = stubborn
        self._gates: dict[Verb, asyncio.Event] = {}
        self._arrival = asyncio.Event()
        if verbs:
            self.hold(*verbs)

    def hold(self, *verbs: Verb) -> None:
        """Let calls of these verbs wait from now on; of all verbs, if none is named."""
        for verb in _checked(verbs):
            self._gates.setdefault(verb, asyncio.Event())

    def release(self, *verbs: Verb) -> None:
        """Let the calls of these verbs go on, and hold none from now on; of all verbs, if none is named."""
        for verb in _checked(verbs):
            gate = self._gates.pop(verb, None)
            if gate is not None:
                gate.set()

    async def reached(self, verb: Verb, count: int = 1) -> None:
        """Wait until `count` calls of the verb have begun in total: each is at the gate, or was."""
        while self.calls[verb] < count:
            await self._arrival.wait()

    async def before(self, verb: Verb, keys: Sequence[ObjectKey], buffers: Buffers) -> None:
        self._arrival.set()
        self._arrival = asyncio.Event()
        gate = self._gates.get(verb)
        if gate is None:
            return
        if self._stubborn and verb in ("load", "store"):
            await _wait_to_the_end(gate)
        else:
            await gate.wait()


class ThrottledBackend(WrappedBackend):
    """A backend at a distance: lookups, loads and stores take at least `latency_seconds`.

    Lookups take `lookup_latency_seconds` where that is given. One that outlasts its timeout (`lookup_timeout_seconds`
    of the cache, 1 s by default) finds nothing: then a cache over this backend has no hits, only `BACKEND_ERROR`.
    The bytes of loads and stores also pass through one pipe of `bytes_per_second` (None: unlimited), first
    come, first served. Latencies overlap, the pipe is shared; a cancelled call leaves it to the next at once.
    """

    def __init__(
        self,
        inner: Backend,
        *,
        latency_seconds: float = 0.0,
        lookup_latency_seconds: float | None = None,
        bytes_per_second: float | None = None,
    ):
        super().__init__(inner)
        self._latency_seconds = latency_seconds
        self._lookup_latency_seconds = latency_seconds if lookup_latency_seconds is None else lookup_latency_seconds
        self._bytes_per_second = bytes_per_second
        self._pipe = asyncio.Lock()

    async def open(self) -> None:
        self._pipe = asyncio.Lock()  # a lock belongs to the loop that it was first waited for in
        await super().open()

    async def before(self, verb: Verb, keys: Sequence[ObjectKey], buffers: Buffers) -> None:
        if verb == "delete":
            return
        if buffers and self._bytes_per_second is not None:
            async with self._pipe:
                await asyncio.sleep(sum(map(len, buffers)) / self._bytes_per_second)
        await asyncio.sleep(self._lookup_latency_seconds if verb == "lookup" else self._latency_seconds)

    async def load_each(self, keys: Sequence[ObjectKey], buffers: Buffers, loaded: Loaded) -> list[LoadOutcome]:
        """Load as `load` does, in as much time; each object is said to be loaded when it has passed the pipe."""
        if self._bytes_per_second is None:
            return await super().load_each(keys, buffers, loaded)
        self.calls["load"] += 1
        self.keys_asked["load"] += len(keys)
        await asyncio.sleep(self._latency_seconds)
        async with self._pipe:
            way = _Way(self._bytes_per_second, loaded)
            try:
                outcomes = await self.inner.load_each(keys, buffers, lambda n: way.enters(n, len(buffers[n])))
                for number, (buffer, outcome) in enumerate(zip(buffers, outcomes, strict=True)):
                    way.enter(number, len(buffer), is_loaded=outcome is LoadOutcome.LOADED)
                await asyncio.sleep(way.seconds_left)
            finally:
                way.close()
        return outcomes


class FailingBackend(WrappedBackend):
    """A backend whose calls of one verb fail: `times` of them, from the `nth` on.

    They raise `error`, or a BackendError. With `keys`, only these objects fail, as on a disk with bad sectors: a load
    answers FAILED for them, a store False, and the rest of the call is done. `nth` counts from 1; `times` None is for
    ever.
    """

    def __init__(
        self,
        inner: Backend,
        verb: Verb,
        nth: int = 1,
        *,
        times: int | None = 1,
        error: Exception | None = None,
        keys: Collection[ObjectKey] | None = None,
    ):
        super().__init__(inner)
        (self._verb,) = _checked((verb,))
        self._first = nth
        self._end = None if times is None else nth + times
        self._error = error or BackendError("injected")
        self._keys = frozenset(keys) if keys is not None else None

    async def before(self, verb: Verb, keys: Sequence[ObjectKey], buffers: Buffers) -> None:
        if self._keys is None and self._fails(verb):
            raise self._error

    async def load(self, keys: Sequence[ObjectKey], buffers: Buffers) -> list[LoadOutcome]:
        return await self.load_each(keys, buffers, not_told)

    async def load_each(self, keys: Sequence[ObjectKey], buffers: Buffers, loaded: Loaded) -> list[LoadOutcome]:
        await self._begin("load", keys, buffers)
        bad = self._bad("load")

        def told(number: int) -> None:
            if keys[number] not in bad:
                loaded(number)

        outcomes = await self.inner.load_each(keys, buffers, told)
        return [LoadOutcome.FAILED if key in bad else of_inner for key, of_inner in zip(keys, outcomes, strict=True)]

    async def load_sized(self, keys: Sequence[ObjectKey], buffers: Buffers) -> list[int | LoadOutcome]:
        sizes, bad = await super().load_sized(keys, buffers), self._bad("load")
        return [LoadOutcome.FAILED if key in bad else of_inner for key, of_inner in zip(keys, sizes, strict=True)]

    async def load_listed(
        self, keys: Sequence[ObjectKey], sizes: Sequence[int], room: Room
    ) -> list[memoryview | LoadOutcome]:
        loaded, bad = await super().load_listed(keys, sizes, room), self._bad("load")
        return [LoadOutcome.FAILED if key in bad else of_inner for key, of_inner in zip(keys, loaded, strict=True)]

    async def store(self, keys: Sequence[ObjectKey], buffers: Buffers) -> list[bool]:
        await self._begin("store", keys, buffers)
        bad = self._bad("store")
        good = [(key, buffer) for key, buffer in zip(keys, buffers, strict=True) if key not in bad]
        stored = iter(await self.inner.store([key for key, _ in good], [buffer for _, buffer in good]))
        return [key not in bad and next(stored) for key in keys]

    def _bad(self, verb: Verb) -> Collection[ObjectKey]:
        """The objects that fail in this call, if the others of it do not."""
        return self._keys if self._keys is not None and self._fails(verb) else ()

    def _fails(self, verb: Verb) -> bool:
        call = self.calls[verb]
        return verb == self._verb and call >= self._first and (self._end is None or call < self._end)


class BitFlipBackend(WrappedBackend):
    """A backend in which, before the `nth` load from 1 on, one bit of each object that it asks for flips at rest."""

    def __init__(self, inner: MemoryBackend, nth: int = 1, bit: int = 0):
        super().__init__(inner)
        self._memory = inner
        self._nth = nth
        self._bit = bit

    async def before(self, verb: Verb, keys: Sequence[ObjectKey], buffers: Buffers) -> None:
        if verb == "load" and self.calls[verb] == self._nth:
            for key in keys:
                flip_bit(self._memory, key, self._bit)


class _Way:
    """The way of the objects of one call through a pipe, each of which is said to be loaded at its end."""

    def __init__(self, bytes_per_second: float, loaded: Loaded):
        self._bytes_per_second = bytes_per_second
        self._loaded = loaded
        self._loop = asyncio.get_running_loop()
        self._passed_at = self._loop.time()
        self._entered: set[int] = set()
        self._ends: list[asyncio.TimerHandle] = []
        self._is_closed = False

    def enters(self, number: int, size_bytes: int) -> None:
        """Let a loaded object in, from whatever thread."""
        self._loop.call_soon_threadsafe(self.enter, number, size_bytes)

    def enter(self, number: int, size_bytes: int, *, is_loaded: bool = True) -> None:
        """Let an object in, unless it is in already; nobody hears of one that was not loaded."""
        if number not in self._entered and not self._is_closed:
            self._entered.add(number)
            self._passed_at += size_bytes / self._bytes_per_second
            if is_loaded:
                self._ends.append(self._loop.call_at(self._passed_at, self._loaded, number))

    @property
    def seconds_left(self) -> float:
        """Until all that has entered has passed."""
        return self._passed_at - self._loop.time()

    def close(self) -> None:
        """Say nothing more."""
        self._is_closed = True
        for end in self._ends:
            end.cancel()


def flip_bit(memory: MemoryBackend, key: ObjectKey, bit: int = 0) -> bool:
    """Flip one bit of a stored object, as failing memory would; False if there is no such object."""
    stored = memory._objects.get(key)  # what a user of the backend has no way to
    if stored is None:
        return False
    piece, index = divmod(bit // 8, STEP_BYTES)
    stored.pieces[piece][index] ^= 1 << bit % 8
    return True


def _checked(verbs: Sequence[Verb]) -> Sequence[Verb]:
    """The verbs, all of them if none is named. Raises ValueError for an unknown one."""
    for verb in verbs:
        if verb not in VERBS:
            raise ValueError(f"{verb!r} is not one of {', '.join(VERBS)}")
    return verbs or VERBS


async def _wait_to_the_end(gate: asyncio.Event) -> None:
    """Wait for the gate whatever happens; a cancel is raised after it."""
    cancelled: asyncio.CancelledError | None = None
    while not gate.is_set():
        try:
            await gate.wait()
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
