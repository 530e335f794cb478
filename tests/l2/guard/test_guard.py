"""A guarded backend: every call ends and counts once, late pins are given back, and nothing is half open for ever."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest

from async_cache import AsyncCache, CacheConfig
from async_cache.errors import BackendError
from async_cache.l2.backend import Backend, Limits, LoadOutcome
from async_cache.l2.guard.breaker import Breaker, BreakerState
from async_cache.l2.guard.call import CallTimeoutError
from async_cache.l2.guard.guard import Guard, Timeouts
from async_cache.l2.memory import MemoryBackend
from async_cache.l2.urls.registry import from_url
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.layout import ModelLayout
from async_cache.prompt.objects import ObjectGroup
from async_cache.testing import FailingBackend, GatedBackend, Verb, WrappedBackend
from async_cache.testing.conformance import content, key, put, views
from tests.virtual import virtual

CLOSED, OPEN, HALF_OPEN = BreakerState
TIMEOUTS = Timeouts(lookup_seconds=1.0, load_seconds=2.0, store_seconds=3.0)
KEYS = [key(n) for n in range(3)]
RESET_SECONDS = 100.0


class Counted(Breaker):
    """A breaker that knows what it was told."""

    def __init__(self, failures: int = 3) -> None:
        super().__init__(failures, RESET_SECONDS)
        self.told: list[str] = []

    def succeeded(self) -> None:
        self.told.append("succeeded")
        super().succeeded()

    def failed(self, now: float) -> None:
        self.told.append("failed")
        super().failed(now)

    def abandoned(self, now: float) -> None:
        self.told.append("abandoned")
        super().abandoned(now)

    def on_trial(self) -> "Counted":
        """The same, whose next call is the one trial."""
        for _ in range(3):
            super().failed(-RESET_SECONDS)
        return self


class Answering(WrappedBackend):
    """Lookups, loads and stores answer as told, after they have done their work."""

    def __init__(self, inner: Backend, answer: Callable[[list[Any]], Any]):
        super().__init__(inner)
        self.answer = answer

    async def lookup(self, keys: Sequence[ObjectKey]) -> list[bool]:
        return self.answer(await super().lookup(keys))

    async def load(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[LoadOutcome]:
        return self.answer(await super().load(keys, buffers))

    async def store(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[bool]:
        return self.answer(await super().store(keys, buffers))


class Late(WrappedBackend):
    """Lookups that are cancelled go on to their end all the same, and answer a minute later."""

    async def lookup(self, keys: Sequence[ObjectKey]) -> list[bool]:
        end = asyncio.get_running_loop().time() + 60
        while asyncio.get_running_loop().time() < end:
            try:
                await asyncio.sleep(end - asyncio.get_running_loop().time())
            except asyncio.CancelledError:
                continue
        return await super().lookup(keys)


def buffers() -> list[memoryview]:
    return views([bytearray(100) for _ in KEYS])


async def load(guard: Guard) -> Any:
    call = guard.begin_load(KEYS, buffers())
    assert call is not None
    return await call.result()


async def store(guard: Guard) -> Any:
    call = guard.begin_store(KEYS, buffers())
    assert call is not None
    return await call.result()


async def every_key(guard: Guard) -> list[ObjectKey]:
    return await guard.next_keys([], 256)


VERBS: dict[str, Callable[[Guard], Awaitable[Any]]] = {
    "lookup": lambda guard: guard.lookup(KEYS),
    "load": load,
    "store": store,
    "delete": lambda guard: guard.delete(KEYS),
    "keys": lambda guard: every_key(guard),
}


# One outcome of each call.


@pytest.mark.parametrize("verb", VERBS)
@virtual
async def test_a_call_that_succeeds_is_counted_once(verb: str) -> None:
    guard = Guard(MemoryBackend(), Counted().on_trial(), TIMEOUTS)
    assert isinstance(await VERBS[verb](guard), list | int)
    await asyncio.sleep(10)
    assert guard.breaker.told == ["succeeded"]
    assert guard.breaker.state is CLOSED


@virtual
async def test_a_load_of_which_nothing_could_be_read_counts_as_failed() -> None:
    backend = FailingBackend(MemoryBackend(), "load", times=1, keys=KEYS)
    await put(backend, range(3), 100)
    guard = Guard(backend, Counted(), TIMEOUTS)
    assert await load(guard) == [LoadOutcome.FAILED] * 3
    assert guard.breaker.told == ["failed"]
    assert await load(guard) == [LoadOutcome.LOADED] * 3


@pytest.mark.parametrize("outcome", [LoadOutcome.LOADED, LoadOutcome.GONE, LoadOutcome.CORRUPT])
@virtual
async def test_a_load_of_which_anything_could_be_read_counts_as_good(outcome: LoadOutcome) -> None:
    guard = Guard(Answering(MemoryBackend(), lambda _: [LoadOutcome.FAILED] * 2 + [outcome]), Counted(), TIMEOUTS)
    assert (await load(guard))[2] is outcome
    assert guard.breaker.told == ["succeeded"]


@virtual
async def test_what_is_in_use_is_pinned_whatever_the_backend_raises(caplog: pytest.LogCaptureFixture) -> None:
    backend = MemoryBackend()
    guard = Guard(backend, Counted(), TIMEOUTS)
    hashes = [k.chunk_hash for k in KEYS]
    with guard.in_use(hashes):
        assert backend.pins == 3
    guard.touch_prefix(hashes)
    assert backend.pins == 0

    def dead(*_: Any) -> None:
        raise asyncio.CancelledError

    backend.unpin_prefix = dead  # type: ignore[method-assign]
    guard.touch_prefix(hashes)
    assert "memory could not" in caplog.text


@pytest.mark.parametrize("error", [OSError("dead"), BackendError("dead"), TypeError("dead")])
@pytest.mark.parametrize("verb", ["lookup", "load", "store", "delete"])
@virtual
async def test_a_call_that_fails_is_counted_once(verb: Any, error: Exception) -> None:
    guard = Guard(FailingBackend(MemoryBackend(), verb, error=error), Counted().on_trial(), TIMEOUTS)
    if verb == "lookup":
        assert await guard.lookup(KEYS) is None
    else:
        with pytest.raises(BackendError, match="dead"):
            await VERBS[verb](guard)
    await asyncio.sleep(10)
    assert guard.breaker.told == ["failed"]
    assert guard.breaker.state is OPEN


@pytest.mark.parametrize("stubborn", [False, True])
@pytest.mark.parametrize(("verb", "seconds"), [("lookup", 1.0), ("load", 2.0), ("store", 3.0), ("delete", 3.0)])
@virtual
async def test_a_call_that_is_silent_is_counted_once_when_its_time_is_over(
    verb: Any, seconds: float, stubborn: bool
) -> None:
    gate = GatedBackend(MemoryBackend(), verb, stubborn=stubborn)
    guard = Guard(gate, Counted().on_trial(), TIMEOUTS)
    if verb == "lookup":
        assert await guard.lookup(KEYS) is None
    else:
        with pytest.raises(CallTimeoutError, match=f"memory did not answer within {seconds} s"):
            await VERBS[verb](guard)
    assert asyncio.get_running_loop().time() == seconds
    assert guard.breaker.told == ["failed"]
    gate.release()
    await asyncio.sleep(10)
    assert guard.breaker.told == ["failed"]


# Silence, and a loop that could not listen.


class Held(WrappedBackend):
    """Lookups answer after so many turns of the loop, when what they wait for has come."""

    def __init__(self, turns: int) -> None:
        super().__init__(MemoryBackend())
        self.came, self._turns = asyncio.Event(), turns

    async def lookup(self, keys: Sequence[ObjectKey]) -> list[bool]:
        await self.came.wait()
        for _ in range(self._turns):
            await asyncio.sleep(0)
        return await super().lookup(keys)


def hold(seconds: float, then: Callable[[], object] = lambda: None) -> None:
    """Hold the loop for so long, at the end of which something comes."""
    loop: Any = asyncio.get_running_loop()
    loop._selector.clock.advance(seconds)
    then()


@pytest.mark.parametrize("begin", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("turns", [0, 1, 5, 20])
@virtual
async def test_an_answer_that_came_while_the_loop_was_held_is_one(begin: float, turns: int) -> None:
    backend = Held(turns)
    guard = Guard(backend, Counted(), TIMEOUTS)
    asyncio.get_running_loop().call_later(begin, hold, 5.0, backend.came.set)
    assert await guard.lookup(KEYS) == [False] * 3
    assert guard.breaker.told == ["succeeded"]


@virtual
async def test_what_answers_in_time_but_for_a_hold_of_the_loop_is_not_silent() -> None:
    loop = asyncio.get_running_loop()
    backend = Held(0)
    guard = Guard(backend, Counted(), TIMEOUTS)
    loop.call_later(0.4, hold, 5.0, lambda: loop.call_later(0.4, backend.came.set))
    assert await guard.lookup(KEYS) == [False] * 3
    assert guard.breaker.told == ["succeeded"]


@pytest.mark.parametrize("begin", [0.0, 0.5, 0.95])
@virtual
async def test_what_stays_silent_after_a_hold_of_the_loop_is_silent(begin: float) -> None:
    guard = Guard(Held(0), Counted(), TIMEOUTS)
    asyncio.get_running_loop().call_later(begin, hold, 5.0)
    assert await guard.lookup(KEYS) is None
    assert 5.8 < asyncio.get_running_loop().time() < 6.2
    assert guard.breaker.told == ["failed"]
    await guard.close(1.0)


@pytest.mark.parametrize("verb", ["lookup", "load", "store", "delete"])
@virtual
async def test_a_call_that_is_given_up_says_nothing_and_the_next_one_tries(verb: Any) -> None:
    gate = GatedBackend(MemoryBackend(), verb)
    guard = Guard(gate, Counted().on_trial(), TIMEOUTS)
    waiter = asyncio.ensure_future(VERBS[verb](guard))
    await gate.reached(verb)
    assert guard.breaker.state is HALF_OPEN
    assert not guard.allows()
    waiter.cancel()
    await asyncio.wait((waiter,))
    if verb in ("load", "store"):  # it goes on: who began it says when it is over
        assert guard.breaker.told == []
        await guard.close(1.0)
    assert guard.breaker.told == ["abandoned"]
    assert guard.allows()


@virtual
async def test_a_call_from_before_a_trial_says_nothing_of_the_trial() -> None:
    gate = GatedBackend(MemoryBackend(), "load")
    guard = Guard(gate, Counted(1), TIMEOUTS)
    early = guard.begin_load(KEYS, buffers())
    assert early is not None
    guard.breaker.failed(asyncio.get_running_loop().time())
    await asyncio.sleep(RESET_SECONDS)
    trial = guard.begin_load(KEYS, buffers())
    assert trial is not None and guard.breaker.state is HALF_OPEN
    early.cancel()
    await asyncio.sleep(0)
    assert guard.breaker.state is HALF_OPEN and not guard.allows()
    trial.cancel()
    assert guard.allows()
    await guard.close(1.0)


@pytest.mark.parametrize("verb", ["load", "store", "delete"])
@virtual
async def test_what_hangs_while_lookups_answer_opens_it_all_the_same(verb: Any) -> None:
    gate = GatedBackend(MemoryBackend(), verb)
    guard = Guard(gate, Counted(3), TIMEOUTS)

    async def hangs() -> None:
        assert await guard.lookup(KEYS) is not None
        with pytest.raises(CallTimeoutError):
            await VERBS[verb](guard)

    for _ in range(3):
        assert guard.breaker.state is CLOSED
        await hangs()
    assert guard.breaker.state is OPEN and not guard.allows()
    await asyncio.sleep(RESET_SECONDS)
    await hangs()  # the lookup was the trial, and one more that hangs is enough
    assert guard.breaker.state is OPEN
    await asyncio.sleep(RESET_SECONDS)
    gate.release()
    assert await guard.lookup(KEYS) == [False] * 3
    await VERBS[verb](guard)
    gate.hold(verb)
    await hangs()
    assert guard.breaker.state is CLOSED, "the failures are counted anew"


@virtual
async def test_a_lookup_from_before_does_not_close_what_loads_have_opened() -> None:
    gate = GatedBackend(MemoryBackend(), "lookup", "load")
    guard = Guard(gate, Counted(3), Timeouts(lookup_seconds=60.0, load_seconds=2.0))
    early = asyncio.ensure_future(guard.lookup(KEYS))
    await asyncio.gather(*(load(guard) for _ in range(3)), return_exceptions=True)
    assert guard.breaker.state is OPEN
    gate.release()
    assert await early == [False] * 3
    assert guard.breaker.state is OPEN and not guard.allows()


class Spoiled(WrappedBackend):
    """Calls of one verb fail that are about a bad object; so do all, once it is dead."""

    def __init__(self, inner: Backend, verb: Verb, bad: Sequence[ObjectKey], *, answering: bool = False):
        super().__init__(inner)
        self.verb, self.bad, self.answering, self.dead = verb, bad, answering, False

    async def before(self, verb: Verb, keys: Sequence[ObjectKey], buffers: Any) -> None:
        if verb == self.verb and not self.answering and (self.dead or set(keys) & set(self.bad)):
            raise BackendError("injected")

    async def load(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[LoadOutcome]:
        outcomes = await super().load(keys, buffers)
        return [
            LoadOutcome.FAILED if self.answering and k in self.bad else o for k, o in zip(keys, outcomes, strict=True)
        ]


async def ask(guard: Guard, verb: str, number: int) -> None:
    """Make one call about one object."""
    keys, its = [key(number)], views([bytearray(100)])
    with suppress(BackendError):
        if verb == "lookup":
            await guard.lookup(keys)
        elif verb == "delete":
            await guard.delete(keys)
        else:
            call = guard.begin_load(keys, its) if verb == "load" else guard.begin_store(keys, its)
            assert call is not None
            await call.result()


@pytest.mark.parametrize("answering", [False, True])
@pytest.mark.parametrize("verb", ["load", "store", "delete"])
@virtual
async def test_an_object_that_fails_alone_leaves_its_backend_in_use(verb: Any, answering: bool) -> None:
    spoiled = Spoiled(MemoryBackend(), verb, [key(1)], answering=answering and verb == "load")
    guard = Guard(spoiled, Counted(3), TIMEOUTS)
    for _ in range(10):
        await ask(guard, "lookup", 1)
        await ask(guard, verb, 1)
        assert guard.breaker.state is CLOSED
    assert spoiled.calls[verb] == 10


@virtual
async def test_a_lookup_that_fails_alone_leaves_its_backend_in_use() -> None:
    guard = Guard(Spoiled(MemoryBackend(), "lookup", [key(1)]), Counted(3), TIMEOUTS)
    for _ in range(10):
        await ask(guard, "load", 2)
        await ask(guard, "lookup", 1)
        assert guard.breaker.state is CLOSED


@pytest.mark.parametrize("verb", ["load", "store", "delete"])
@virtual
async def test_objects_that_fail_one_after_the_other_leave_their_backend_alone(verb: Any) -> None:
    spoiled = Spoiled(MemoryBackend(), verb, [])
    spoiled.dead = True
    guard = Guard(spoiled, Counted(3), TIMEOUTS)
    for number in range(3):
        assert guard.breaker.state is CLOSED
        await ask(guard, "lookup", number)
        await ask(guard, verb, number)
    assert guard.breaker.state is OPEN


@pytest.mark.parametrize("verb", ["lookup", "load", "store", "delete"])
@virtual
async def test_a_backend_that_is_dead_is_left_alone_as_soon_where_the_same_is_asked(verb: Any) -> None:
    spoiled = Spoiled(MemoryBackend(), verb, [])
    spoiled.dead = True
    guard = Guard(spoiled, Counted(3), TIMEOUTS)
    for _ in range(3):
        assert guard.breaker.state is CLOSED
        await ask(guard, verb, 1)
    assert guard.breaker.state is OPEN


@virtual
async def test_a_load_that_succeeds_between_others_that_fail_begins_the_count_anew() -> None:
    guard = Guard(Spoiled(MemoryBackend(), "load", [key(n) for n in range(20)]), Counted(3), TIMEOUTS)
    for number in range(0, 20, 2):
        for bad in (number, number + 1):
            await ask(guard, "lookup", bad)
            await ask(guard, "load", bad)
        assert guard.breaker.state is CLOSED
        await ask(guard, "load", 99)


@virtual
async def test_a_call_nobody_waits_for_is_counted_too() -> None:
    guard = Guard(FailingBackend(MemoryBackend(), "load"), Counted(1), TIMEOUTS)
    assert guard.begin_load(KEYS, buffers()) is not None
    await asyncio.sleep(0.1)
    assert guard.breaker.told == ["failed"]
    assert guard.begin_load(KEYS, buffers()) is None


@virtual
async def test_a_call_cancelled_twice_and_after_its_time_is_counted_once() -> None:
    gate = GatedBackend(MemoryBackend(), "load", stubborn=True)
    guard = Guard(gate, Counted(), TIMEOUTS)
    call = guard.begin_load(KEYS, buffers())
    assert call is not None
    with pytest.raises(CallTimeoutError):
        await call.result()
    call.cancel()
    call.cancel()
    assert not call.has_ended
    ended: list[bool] = []
    call.when_ended(lambda: ended.append(call.has_ended))
    gate.release()
    await asyncio.sleep(0.1)
    assert ended == [True]
    assert guard.breaker.told == ["failed"]


@virtual
async def test_a_call_that_is_cancelled_before_its_first_step_is_given_up() -> None:
    backend = WrappedBackend(MemoryBackend())
    guard = Guard(backend, Counted().on_trial(), TIMEOUTS)
    call = guard.begin_load(KEYS, buffers())
    assert call is not None
    call.cancel()
    with pytest.raises(BackendError, match="cancelled"):
        await call.result()
    assert not backend.calls
    assert guard.breaker.told == ["abandoned"]
    assert guard.allows()


@virtual
async def test_a_trial_that_never_says_anything_is_followed_by_another() -> None:
    gate = GatedBackend(MemoryBackend(), "load", stubborn=True)
    guard = Guard(gate, Counted().on_trial(), TIMEOUTS)
    assert guard.begin_load(KEYS, buffers()) is not None  # and whoever began it raises before it waits
    assert guard.begin_load(KEYS, buffers()) is None
    await asyncio.sleep(RESET_SECONDS)
    assert guard.breaker.state is HALF_OPEN
    gate.release()
    assert await load(guard) == [LoadOutcome.GONE] * 3
    assert guard.breaker.state is CLOSED


# Answers that make no sense.


@pytest.mark.parametrize("answer", [lambda a: a[:-1], lambda a: a + a[-1:], tuple, lambda a: None, lambda a: 5])
@pytest.mark.parametrize("verb", ["lookup", "load", "store"])
@virtual
async def test_an_answer_of_another_length_is_a_failure(verb: str, answer: Any) -> None:
    memory = MemoryBackend()
    guard = Guard(Answering(memory, answer), Counted(), TIMEOUTS)
    if verb == "lookup":
        assert await guard.lookup(KEYS) is None
    else:
        with pytest.raises(BackendError, match="did not answer 3 questions"):
            await VERBS[verb](guard)
    assert guard.breaker.told == ["failed"]


@pytest.mark.parametrize(("answer", "left"), [(lambda a: a[:-1], 1), (lambda a: a + a[-1:], 0), (lambda a: None, 3)])
@virtual
async def test_what_a_wrong_answer_says_was_pinned_is_unpinned(answer: Any, left: int) -> None:
    memory = MemoryBackend()
    await put(memory, range(3), 100)
    guard = Guard(Answering(memory, answer), Counted(), TIMEOUTS)
    assert await guard.lookup(KEYS) is None
    await asyncio.sleep(0.1)
    assert memory.pins == left


@virtual
async def test_a_number_of_deleted_objects_that_is_none_is_a_failure() -> None:
    class Odd(MemoryBackend):
        async def delete(self, keys: Sequence[ObjectKey]) -> int:
            return None  # type: ignore[return-value]

    with pytest.raises(BackendError, match="did not say how much it deleted"):
        await Guard(Odd(), Counted(), TIMEOUTS).delete(KEYS)


# Pins of answers that nobody waits for.


@pytest.mark.parametrize("given_up", [False, True])
@virtual
async def test_the_pins_of_a_late_answer_are_given_back(given_up: bool) -> None:
    memory = MemoryBackend()
    await put(memory, range(2), 100)
    guard = Guard(Late(memory), Counted(), TIMEOUTS)
    lookup = asyncio.ensure_future(guard.lookup(KEYS))
    await asyncio.sleep(0.5)
    if given_up:
        lookup.cancel()
        await asyncio.wait((lookup,))
    else:
        assert await lookup is None
    unpinned: Counter[ObjectKey] = Counter()
    memory.unpin = unpinned.update  # type: ignore[method-assign]
    await asyncio.sleep(100)
    assert unpinned == dict.fromkeys(KEYS[:2], 1)
    assert memory.pins == 2
    assert guard.breaker.told == ["abandoned" if given_up else "failed"]


@virtual
async def test_an_answer_at_once_of_another_length_is_none_and_unpinned(caplog: pytest.LogCaptureFixture) -> None:
    layout = ModelLayout("model", (ObjectGroup((100,), "uint8"),), chunk_tokens=1)
    hashes = [k.chunk_hash for k in KEYS]

    class Odd(MemoryBackend):
        def lookup_nowait(self, chunk_hashes: Any, objects: Any) -> list[bool] | None:
            found = super().lookup_nowait(chunk_hashes, objects)
            return found and found[:2]

    memory = Odd()
    await put(memory, range(2), 100)
    guard = Guard(memory, Counted(), TIMEOUTS)
    assert guard.lookup_nowait(layout, hashes, layout.objects.full_mask) is None
    assert memory.pins == 0
    assert "did not answer at once with a list of 3" in caplog.text


@virtual
async def test_while_it_is_not_closed_nothing_is_answered_at_once() -> None:
    layout = ModelLayout("model", (ObjectGroup((100,), "uint8"),), chunk_tokens=1)
    memory = MemoryBackend()
    await put(memory, range(3), 100)
    guard = Guard(memory, Counted().on_trial(), TIMEOUTS)
    assert guard.lookup_nowait(layout, [KEYS[0].chunk_hash], layout.objects.full_mask) is None
    assert await guard.lookup(KEYS[:1]) == [True]
    assert guard.lookup_nowait(layout, [KEYS[0].chunk_hash], layout.objects.full_mask) == [True]


@pytest.mark.parametrize("error", [OSError("dead"), asyncio.CancelledError()])
@virtual
async def test_what_raises_where_nothing_may_is_logged(error: Any, caplog: pytest.LogCaptureFixture) -> None:
    def dead(*_: Any) -> Any:
        raise error

    backend = MemoryBackend()
    backend.unpin = backend.usage = backend.lookup_nowait = dead  # type: ignore[method-assign]
    guard = Guard(backend, Counted(), TIMEOUTS)
    layout = ModelLayout("model", (ObjectGroup((100,), "uint8"),), chunk_tokens=1)
    guard.unpin(KEYS)
    assert guard.usage() is None
    assert guard.lookup_nowait(layout, [KEYS[0].chunk_hash], layout.objects.full_mask) is None
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 3


# The end.


@virtual
async def test_close_cancels_what_is_out_and_waits_no_longer_than_it_may(caplog: pytest.LogCaptureFixture) -> None:
    gate = GatedBackend(MemoryBackend(), "load", "store", stubborn=True)
    guard = Guard(gate, Counted(), TIMEOUTS)
    calls = [guard.begin_load(KEYS, buffers()), guard.begin_store(KEYS, buffers())]
    await gate.reached("store")
    await guard.close(7.0)
    assert asyncio.get_running_loop().time() == 7.0
    assert "2 calls have not ended at close" in caplog.text
    gate.release()
    await asyncio.sleep(1)
    assert all(call is not None and call.has_ended for call in calls)


# Limits.

ROW = CacheConfig(
    l2=(),
    lookup_timeout_seconds=11,
    load_timeout_seconds=12,
    store_timeout_seconds=13,
    breaker_failures=2,
    breaker_reset_seconds=14,
)
GIVEN = "lookup_timeout=21&load_timeout=22&store_timeout=23&breaker_failures=4&breaker_reset=24"


@pytest.mark.parametrize(("query", "first", "failures", "reset"), [("", 11, 2, 14), (GIVEN, 21, 4, 24)])
@virtual
async def test_the_limits_of_a_url_come_before_the_settings(query: str, first: int, failures: int, reset: int) -> None:
    loop = asyncio.get_running_loop()
    verbs: list[tuple[Verb, int]] = [("lookup", 0), ("load", 1), ("store", 2), ("delete", 2)]
    for verb, more in verbs:
        gate = GatedBackend(from_url(f"memory://?{query}"), verb)
        guard = Guard.of(gate, ROW)
        for _ in range(failures):
            begin = loop.time()
            assert guard.allows()
            await asyncio.wait((asyncio.ensure_future(VERBS[verb](guard)),))
            assert loop.time() - begin == first + more
        assert not guard.allows()
        await asyncio.sleep(reset - 0.001)
        assert not guard.allows()
        await asyncio.sleep(0.001)
        assert guard.allows()


@virtual
async def test_each_limit_comes_alone() -> None:
    for name in Limits.__struct_fields__:
        backend = MemoryBackend()
        backend.limits = Limits(**{name: 5})
        guard = Guard.of(backend, ROW)
        found = [*(getattr(guard.timeouts, f"{verb}_seconds") for verb in ("lookup", "load", "store"))]
        found += [guard.breaker.limit, guard.breaker.reset_seconds]
        assert found == [5 if name == each else getattr(ROW, each) for each in Limits.__struct_fields__]


LAYOUT = ModelLayout("model", (ObjectGroup((100,), "uint8"),), chunk_tokens=1)
PROMPT = LAYOUT.prompt([1, 2, 3])


async def filled(*, silent: Any, query: str = "") -> GatedBackend:
    """A backend that has all of the prompt, and does not answer calls of one verb."""
    backend = GatedBackend(from_url(f"memory://?{query}"), silent)
    keys = [ObjectKey(chunk_hash, 0, 0) for chunk_hash in PROMPT.chunk_hashes]
    assert all(await backend.inner.store(keys, views([content(n, 100) for n in range(3)])))
    return backend


@pytest.mark.parametrize(("query", "seconds"), [("", 11), ("lookup_timeout=3", 3), ("load_timeout=3", 11)])
@virtual
async def test_a_cache_waits_for_a_lookup_as_long_as_the_url_says(query: str, seconds: float) -> None:
    async with AsyncCache(ROW, [await filled(silent="lookup", query=query)]) as cache:
        assert (await cache.prefetch(PROMPT).lookup_done).chunks == 0
        assert asyncio.get_running_loop().time() == seconds


@pytest.mark.parametrize(("query", "seconds"), [("", 12), ("load_timeout=3", 3), ("lookup_timeout=3", 12)])
@virtual
async def test_a_cache_waits_for_a_load_as_long_as_the_url_says(query: str, seconds: float) -> None:
    async with AsyncCache(ROW, [await filled(silent="load", query=query)]) as cache:
        prefetch = cache.prefetch(PROMPT)
        assert (await prefetch.lookup_done).chunks == 3
        assert (await prefetch.load_done).chunks == 0
        assert asyncio.get_running_loop().time() == seconds


@pytest.mark.parametrize(("query", "seconds"), [("", 13), ("store_timeout=3", 3)])
@virtual
async def test_a_cache_waits_for_a_deletion_as_long_as_the_url_says(query: str, seconds: float) -> None:
    async with AsyncCache(ROW, [await filled(silent="delete", query=query)]) as cache:
        with pytest.raises(BackendError):
            await cache.delete(PROMPT)
        assert asyncio.get_running_loop().time() == seconds


@pytest.mark.parametrize(("limits", "seconds"), [(Limits(), 12), (Limits(load_timeout_seconds=3), 3)])
@virtual
async def test_a_cache_waits_for_a_backend_to_open_as_long_as_it_says(limits: Limits, seconds: float) -> None:
    class Closed(MemoryBackend):
        async def open(self) -> None:
            await asyncio.sleep(1000)

    backend = Closed()
    backend.limits = limits
    with pytest.raises(BackendError, match=f"not open within {seconds}"):
        await AsyncCache(ROW, [backend]).open()


@pytest.mark.parametrize(("query", "calls"), [("", 2), ("breaker_failures=5", 5)])
@virtual
async def test_a_cache_leaves_a_backend_alone_after_as_many_failures_as_the_url_says(query: str, calls: int) -> None:
    broken = FailingBackend(from_url(f"memory://?{query}&breaker_reset=3".replace("?&", "?")), "lookup", times=None)
    async with AsyncCache(ROW, [broken]) as cache:
        for _ in range(10):
            await cache.prefetch(PROMPT).lookup_done
        assert broken.calls["lookup"] == calls
        await asyncio.sleep(3)
        for _ in range(10):
            await cache.prefetch(PROMPT).lookup_done
        assert broken.calls["lookup"] == calls + 1


@virtual
async def test_guards_and_backends_can_be_printed() -> None:
    gate = GatedBackend(MemoryBackend("near"), "load")
    guard = Guard(gate, Counted(), TIMEOUTS)
    assert repr(guard) == "<Guard of <GatedBackend of <MemoryBackend 'near'>>, closed, 0 calls out>"
    guard.begin_load(KEYS, buffers())
    assert "1 calls out" in repr(guard)
    await guard.close(1.0)
    assert repr(from_url("fs:///var/kv")) == "<FileSystemBackend 'fs:///var/kv'>"


async def test_what_is_known_of_objects_that_could_not_be_read_is_bounded() -> None:
    guard = Guard(MemoryBackend(), Counted(), TIMEOUTS)
    for begin in range(0, 200_000, 1000):
        guard.faults.suspect(key(n) for n in range(begin, begin + 1000))
        assert 0 < len(guard.faults) <= 67_000


async def test_a_backend_tells_the_cache_that_uses_it_and_after_that_nobody():
    backend = MemoryBackend()
    first, second = (Guard(backend, Counted(), TIMEOUTS) for _ in range(2))
    hears = backend.on_removed
    await first.close(1)  # not the one that it tells
    assert backend.on_removed is hears
    await second.close(1)
    assert backend.on_removed is not hears
