"""The whole way of a prefetch: find in L1, ask L2, promise (`lookup_done`), load, hand over (`load_done`)."""

import asyncio
import logging
from collections.abc import Generator, Mapping, Sequence

from async_cache.advice import Adviser
from async_cache.aio.clock import precise_clock
from async_cache.aio.slices import Wait
from async_cache.aio.sweeper import Sweeper
from async_cache.aio.worker import Worker
from async_cache.config import CacheConfig
from async_cache.handles.prefetch import Prefetch, SegmentPrefetch
from async_cache.l1.entry import Entry
from async_cache.l1.store import L1Store
from async_cache.l2.guard.guards import Guards
from async_cache.l2.tombstones import Tombstones
from async_cache.ledger.roots import Roots
from async_cache.observe import Observers, notify
from async_cache.prompt import coverage
from async_cache.prompt.arguments import Wanted
from async_cache.prompt.layout import Prompt
from async_cache.read.answers import Promised, hits_of, nothing, result_of
from async_cache.read.decision import Decider
from async_cache.read.filling import Filling
from async_cache.read.loads import Arrival, Loader
from async_cache.read.misses import Misses
from async_cache.read.plan import Planner
from async_cache.read.request import LOADED, LOADING, LOOKING_UP, Request
from async_cache.read.requests import Requests
from async_cache.values import Shortfall

log = logging.getLogger(__name__)

Steps = Generator[Wait, None, Promised]


class PrefetchController:
    """Takes requests on their way, from `start` until they are loaded. `requests` knows them until they are over."""

    def __init__(
        self,
        l1: L1Store,
        guards: Guards,
        loader: Loader,
        sweeper: Sweeper,
        hashing: Worker,
        tombstones: Tombstones,
        observers: Observers,
        config: CacheConfig,
        misses: Misses,
        roots: Roots,
        filling: Filling,
    ):
        self.requests = Requests(l1, sweeper, observers, config, self._give_up)
        self._l1 = l1
        self._guards = guards
        self._loader = loader
        self._observers = observers
        self._planner = Planner(l1, loader, config)
        self._decider = Decider(l1, guards, loader, tombstones, self._planner, hashing, misses, roots, filling)
        self._loop = asyncio.get_running_loop()
        self._clock = precise_clock(self._loop)
        self._adviser = Adviser(config.prefill_tokens_per_second, self._loop.time)
        self._tasks: set[asyncio.Task[None]] = set()
        self._cancel = self.cancel  # one for all

    def start(self, wanted: Wanted) -> Prefetch:
        """Begin a request, or return the one that runs under this id. What needs no waiting is known on return.

        Raises RequestConflictError if the id is in use for something else.
        """
        requests, prompt, request_id = self.requests, wanted.asked, wanted.request_id
        start_chunk, ranks, deadline_seconds = wanted.start_chunk, wanted.ranks, wanted.deadline_seconds
        if request_id is None:
            request_id = requests.new_id()
        elif (known := requests.same(request_id, prompt, start_chunk, ranks)) is not None:
            return known.prefetch
        request = Request(request_id, prompt, start_chunk, ranks, self._clock(), self._loop)
        request.traceparent = wanted.traceparent
        if wanted.wait_for_writers_seconds:
            request.waits_until = self._loop.time() + wanted.wait_for_writers_seconds
        handle = Prefetch if isinstance(prompt, Prompt) else SegmentPrefetch
        request.prefetch = prefetch = handle(request, self._cancel)
        requests.add(request)
        self._decide(request)
        if deadline_seconds is not None and request.pending:
            request.due = request.began + deadline_seconds
            request.deadline = self._loop.call_later(deadline_seconds, self._deadline_passed, request)
        return prefetch

    def reconfigure(self, config: CacheConfig) -> None:
        """Go by the settings as they are now."""
        self._adviser.tokens_per_second = config.prefill_tokens_per_second
        self._planner.reconfigure(config)
        self.requests.reconfigure(config)

    def cancel(self, request: Request) -> None:
        """Give up what is pending of a request; what has loaded stays."""
        self._give_up(request, Shortfall.CANCELLED)

    async def close(self) -> None:
        """End all requests: whoever waits for one gets CacheClosedError."""
        self.requests.close()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # From the lookup to the promise.

    def _decide(self, request: Request) -> None:
        """Decide what is promised, in this step if that needs no waiting."""
        try:
            if request.prompt.hashed and self._decider.is_all_in_l1(request):
                self._note_asked(request)
                self._say_hits(request, Promised(request.lengths))
                self._finish(request)
                return
        except Exception:
            self._fail(request)
            return
        steps = self._decider.steps(request)
        wait = self._step(request, steps)
        if wait is not None:
            request.task = self._loop.create_task(self._go_on(request, steps, wait))
            self._tasks.add(request.task)
            request.task.add_done_callback(self._tasks.discard)

    async def _go_on(self, request: Request, steps: Steps, wait: Wait | None) -> None:
        """Take a request from step to step until it is decided, and wait in between for what it says."""
        try:
            while wait is not None:
                await wait()
                wait = self._step(request, steps)
        except Exception:
            self._fail(request)

    def _step(self, request: Request, steps: Steps) -> Wait | None:
        """Take a request one step further; what to wait for before the next, or None if it is decided.

        Whatever raises on the way: the request ends with nothing, and nothing stays held.
        """
        try:
            wait = next(steps)
            if request.search is not None:
                request.search.wait()
            return wait
        except StopIteration as end:
            self._promise(request, end.value)
        except Exception:
            self._fail(request)
        return None

    def _promise(self, request: Request, promised: Promised) -> None:
        try:
            self._close_search(request)
            self._note_asked(request)
            self._say_hits(request, promised)
            self._loader.begin_soon()
            if not request.loads:
                self._finish(request)
        except Exception:
            self._fail(request)

    def _note_asked(self, request: Request) -> None:
        asked = request.prompt
        self._l1.asked(asked.parts, asked.salt)
        for guard in self._guards.current:
            guard.asked(asked.parts)
        for note in self._observers.asking:
            for prompt in asked.parts:
                note(prompt)

    def _fail(self, request: Request) -> None:
        log.exception("request %r failed", request.request_id, extra={"request_id": request.request_id})
        self._give_up(request, Shortfall.BACKEND_ERROR)

    def _close_search(self, request: Request) -> None:
        search, request.search = request.search, None
        if search is not None:
            search.close()

    # From the promise to the result.

    def arrived(self, request: Request, arrivals: Sequence[Arrival]) -> None:
        """Take note that chunks have arrived, or have not; the last one ends the load.

        Whatever raises here is a fault of this request, and of no other that waits for the same chunks.
        """
        try:
            self._take_note(request, arrivals)
        except Exception:
            self._fail(request)

    def _take_note(self, request: Request, arrivals: Sequence[Arrival]) -> None:
        entries, needed, local = request.entries, request.needed, request.local_mask
        new: list[Entry] = []
        old: list[Entry] = []
        for number, entry, failure in arrivals:
            if number not in request.loads:
                continue  # it has left, and its share is about to
            request.loads.remove(number)
            held = entries[number]
            if held is None or (entry is not None and entry is not held and not held.present & ~entry.present):
                if entry is not None:
                    new.append(entry)
                    entries[number] = entry
                if held is not None:
                    old.append(held)
            else:  # also where it left L1, and what has come in its place has less
                entry = held
            if number >= len(needed):
                if failure is not None:
                    request.reasons[number] = failure
            elif needed[number] & local & ~(entry.present if entry is not None else 0):
                request.reasons[number] = failure or Shortfall.GONE
            elif request.reasons:  # what lacked when a part came that another one had asked for has come, too
                request.reasons.pop(number, None)
        self._l1.uses.lease(new)
        self._l1.uses.release(old)
        if request.state is LOADING and not request.loads:
            self._finish(request)
        else:
            request.wake_streams()

    def _finish(self, request: Request) -> None:
        """End the load: keep what can be read, and say how much that is."""
        layout = request.prompt.layout
        shortfalls = self._shorten(request) if request.reasons else {}
        if request.reasons or not layout.objects.prefix_mask:
            request.release(self._l1, request.needed)
        self._say_result(request, shortfalls)

    def _shorten(self, request: Request) -> dict[int, Shortfall]:
        """Promise no more of each prompt than has come; why that is less, by its number."""
        layout, runs, shortfalls = request.prompt.layout, request.runs, {}
        elsewhere = layout.objects.full_mask & ~request.local_mask
        exists = [(e.present if e is not None else 0) | elsewhere for e in request.entries]
        lengths = list(request.lengths)
        for part, (run, length) in enumerate(zip(runs, request.lengths, strict=True)):
            run = run[:length]
            lengths[part] = came = coverage.lengths(layout, coverage.run_of(run, exists)[:length])[-1]
            if came < length:
                reasons = (request.reasons[number] for number in run[came:] if number in request.reasons)
                shortfalls[part] = next(reasons, Shortfall.GONE)
        if shortfalls:
            request.promise(lengths, coverage.needed_of(layout, runs, lengths))
            kept = coverage.covered(runs, lengths)
            request.from_l2 = [number for number in request.from_l2 if number < len(kept) and kept[number]]
        return shortfalls

    def _say_hits(self, request: Request, promised: Promised) -> None:
        request.state = LOADING
        request.promised_at = self._clock()
        hits = hits_of(request, promised, self._adviser)
        if request.hits.resolve(hits) and self._observers.promised:
            notify(self._observers.promised, request.prefetch, hits)

    def _say_result(self, request: Request, shortfalls: Mapping[int, Shortfall]) -> None:
        request.state = LOADED
        if request.deadline is not None:
            request.deadline.cancel()
        self.requests.loaded(request)
        result = result_of(request, shortfalls, self._clock() - request.began)
        if request.result.resolve(result):
            for count in self._observers.counting:
                count(request, result)
            if self._observers.loaded:
                notify(self._observers.loaded, request.prefetch, result)
        request.wake_streams()

    # What ends a request before it has loaded.

    def _deadline_passed(self, request: Request) -> None:
        if request.state is LOOKING_UP:
            self._give_up(request, Shortfall.DEADLINE)
        elif request.state is LOADING:
            request.reasons |= dict.fromkeys(request.loads, Shortfall.DEADLINE)
            self._release_loads(request)
            self._finish(request)

    def _give_up(self, request: Request, reason: Shortfall) -> None:
        """Resolve what is pending of a request, with nothing, and let nothing stay held for it."""
        if not request.pending:
            return
        task, request.task = request.task, None  # which keeps where it was cancelled, and that the request
        if task is not None and task is not asyncio.current_task():
            task.cancel()
        self._release_loads(request)
        self._close_search(request)
        rooms, request.rooms = request.rooms, ()
        self._l1.discard([reservation for _, reservation in rooms])
        parts = range(len(request.lengths))
        request.promise([0] * len(parts), ())
        request.from_l2 = ()
        request.release(self._l1)
        if request.state is LOOKING_UP:
            self._say_hits(request, nothing(request, reason))
        self._say_result(request, dict.fromkeys(parts, reason))

    def _release_loads(self, request: Request) -> None:
        numbers, request.loads = request.loads, set()
        if numbers:
            hashes = (
                request.hashes
            )  # the tail first: else each batch of very many would be begun as the one before it ends
            self._loader.release(request, [hashes[number] for number in sorted(numbers, reverse=True)])

    def check_integrity(self) -> None:
        """Assert that the shares of loads are those of the requests."""
        self.requests.check_integrity()
        table = self._loader.in_flight()
        for request in self.requests:
            hashes = request.hashes
            assert all(request in table[hashes[number]].shares for number in request.loads)
