"""`Lane`: copies of one direction between the pages of a GPU and host memory, through a bounded ring of staging slots.

A copy is cut into parts that fit a slot, and a part has two steps: blocks are gathered into staging memory, and that is
copied to the host by a copy engine; or the other way round. Two streams keep both engines at work, events tie them
together. Two threads do what would hold up others: one launches, and waits for slots; one waits for what was launched,
and passes the fences. Host memory that is not pinned goes through pinned memory of the slot.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

from async_cache.integrations.paged.device import Copy, DeviceError, resolve
from async_cache.integrations.paged.orders import NO_BLOCK
from async_cache.integrations.paged.pins import Pins

_CLOSE_SECONDS = 10.0  # for what has been launched
_NOTHING = torch.empty(0)


class Part(NamedTuple):
    """Some layers of an object: where their bytes are in it, and their pages, each (layers, blocks, words)."""

    begin: int
    end: int
    pages: tuple[torch.Tensor, ...]


def parts_of(rows: Sequence[torch.Tensor], blocks: int, most_bytes: int) -> list[Part]:
    """An object of so many blocks of these rows, as parts of at most so many bytes, or of a layer."""
    layers = [row[n : n + 1] for row in rows for n in range(row.shape[0])]
    layer_bytes = blocks * layers[0][0, 0].nbytes
    step = max(1, most_bytes // layer_bytes)
    parts, begin = [], 0
    for first in range(0, len(layers), step):
        pages, left = [], min(step, len(layers) - first)
        end, skipped = begin + left * layer_bytes, first
        for row in rows:
            taken = row[skipped : skipped + left] if skipped < row.shape[0] else row[:0]
            skipped, left = max(0, skipped - row.shape[0]), left - taken.shape[0]
            if taken.shape[0]:
                pages.append(taken)
        parts.append(Part(begin, end, tuple(pages)))
        begin = end
    return parts


@dataclass(eq=False)
class Job(Copy):
    """One copy, on its way through a lane. `lock` is held while a part of it is launched, and tells of each."""

    parts: Sequence[Part] = ()
    blocks: Sequence[int] = ()
    host: torch.Tensor = _NOTHING
    after: Any = None  # an event: what the engine had submitted
    lock: threading.Condition = field(default_factory=threading.Condition)
    reading: Any = None  # an event behind the blocks that the parts which were launched read
    launched: int = 0  # parts
    given_up: bool = False
    error: Exception | None = None  # the first of its parts'

    @property
    def has_launched(self) -> bool:
        """Whether nothing more of it will be launched."""
        return self.given_up or self.launched == len(self.parts)

    def give_up(self) -> None:
        """Launch nothing more of it. `lock` is held."""
        self.given_up = self.given_up or self.launched < len(self.parts)
        self.lock.notify_all()


class Slot:
    """Staging memory on the device, as much pinned memory, and the numbers of blocks in both."""

    def __init__(self, size_bytes: int, blocks: int, device: torch.device, *, pinned: bool):
        self.staging = torch.empty(size_bytes, dtype=torch.uint8, device=device)
        self.bounce = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=pinned)
        self.rows = torch.empty(blocks, dtype=torch.int64, device=device)
        self.numbers = torch.empty(blocks, dtype=torch.int64, pin_memory=pinned)


class Launched(NamedTuple):
    """A part that was launched, and the events behind its two steps."""

    job: Job
    is_last: bool
    slot: Slot
    read: Any
    done: Any
    bounced: tuple[torch.Tensor, torch.Tensor] | None = None  # to, from: when it has left the device


class Refused(NamedTuple):
    """A job of which no more is launched."""

    job: Job
    error: Exception


class Bounce:
    """Copies in host memory, by so many threads at a time."""

    _LEAST_BYTES = 1 << 20  # for a thread

    def __init__(self, threads: int):
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "async_cache bounce")

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """Copy bytes, all of which are there when this returns."""
        size = to.numel()
        count = max(1, min(self._threads, size // self._LEAST_BYTES))
        bounds = pairwise(size * n // count for n in range(count + 1))
        pieces = [(to[begin:end], source[begin:end]) for begin, end in bounds]
        others = [self._pool.submit(_copy, *piece) for piece in pieces[1:]]
        try:
            _copy(*pieces[0])
        finally:
            wait(others)  # also where it fails: the memory is somebody else's from then on
        for other in others:
            other.result()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False)


class Lane(ABC):
    """One direction. `begin` is for one thread."""

    def __init__(
        self, name: str, runtime: Any, device: torch.device, slots: Sequence[Slot], pins: Pins, bounce: Bounce
    ):
        self._runtime, self._device = runtime, device
        self._pins, self._bounce = pins, bounce
        self._pages, self._wire = runtime.Stream(device), runtime.Stream(device)
        self._slots: SimpleQueue[Slot] = SimpleQueue()
        for slot in slots:
            self._slots.put(slot)
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._launched: SimpleQueue[Launched | Refused | None] = SimpleQueue()
        self._under_way: set[Job] = set()
        self._closed = False
        self._closing = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(loop,), name=f"async_cache {name} {what}", daemon=True)
            for what, loop in (("launch", self._launch_all), ("land", self._land_all))
        ]

    def begin(self, job: Job) -> None:
        """Let a job go its way. Raises DeviceError once it is closed."""
        with self._closing:
            if self._closed:
                raise DeviceError("the device is closed")
            if self._threads[0].ident is None:  # not before: an engine captures graphs first, which calls would spoil
                self._start()
            self._under_way.add(job)
            self._jobs.put(job)

    def _start(self) -> None:
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError as error:  # one without the other would leave copies without an end
            self._closed = True
            self._jobs.put(None)
            raise DeviceError(f"there is no thread that copies: {error}") from error

    def close(self) -> bool:
        """Let what was launched end, and fail the rest; whether all has ended."""
        with self._closing:
            self._closed = True
            if self._threads[0].ident is None:
                return True
            self._jobs.put(None)
        end = time.monotonic() + _CLOSE_SECONDS
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0, end - time.monotonic()))
        for job in list(self._under_way):
            job.end(DeviceError("the device is closed"))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self, loop: Callable[[], None]) -> None:
        with torch.inference_mode(), self._runtime.device(self._device):  # pages may be tensors of that mode
            loop()

    # Launching.

    def _launch_all(self) -> None:
        for job in iter(self._jobs.get, None):
            try:
                for number, part in enumerate(job.parts):
                    self._launched.put(self._launch_next(job, part, is_last=number + 1 == len(job.parts)))
            except Exception as error:
                with job.lock:
                    job.give_up()
                self._launched.put(Refused(job, error))
            del job  # a thread that waits keeps nobody's memory
        self._launched.put(None)

    def _launch_next(self, job: Job, part: Part, *, is_last: bool) -> Launched:
        slot = self._slots.get()
        try:
            return self._launch(job, part, slot, is_last=is_last)
        except BaseException as error:
            if not isinstance(error, DeviceError):  # what was launched of the part may still use the slot
                self._drain()
            self._slots.put(slot)
            raise

    @abstractmethod
    def _launch(self, job: Job, part: Part, slot: Slot, *, is_last: bool) -> Launched:
        """Launch both steps of a part. Raises DeviceError where it is not to be launched any more."""

    def _check(self, job: Job) -> None:
        if job.given_up or self._closed:
            raise DeviceError("given up: the engine needs its blocks" if job.given_up else "the device is closed")

    def _send_rows(self, job: Job, slot: Slot) -> torch.Tensor:
        """The numbers of the blocks, on the device for what its stream does from now on."""
        count = len(job.blocks)
        slot.numbers[:count].copy_(torch.tensor(job.blocks))
        return slot.rows[:count].copy_(slot.numbers[:count], non_blocking=True)

    def _host_of(self, job: Job, part: Part, slot: Slot) -> tuple[torch.Tensor, torch.Tensor]:
        """The part in the host's memory, and what the copy engine has to do with: that itself, or pinned memory."""
        whole = job.host.view(-1).view(torch.uint8)[part.begin : part.end]
        is_pinned = self._pins.whole(whole.data_ptr(), whole.numel())
        return whole, whole if is_pinned else slot.bounce[: whole.numel()]

    def _event(self, stream: Any) -> Any:
        event = self._runtime.Event(blocking=True)
        event.record(stream)
        return event

    # Landing.

    def _land_all(self) -> None:
        for launched in iter(self._launched.get, None):
            if isinstance(launched, Refused):
                self._end(launched.job, launched.error)
            else:
                self._land(launched)
            del launched  # a thread that waits keeps nobody's memory

    def _land(self, launched: Launched) -> None:
        job = launched.job
        try:
            self._wait_for(launched)
        except Exception as error:
            job.error = job.error or error
            self._drain()
        self._slots.put(launched.slot)
        if launched.is_last:
            self._end(job, job.error)

    def _wait_for(self, launched: Launched) -> None:
        """Wait for both steps of a part, and pass the first fence between them."""
        launched.read.synchronize()
        if launched.is_last and launched.job.error is None:
            resolve(launched.job.read)
        launched.done.synchronize()
        if launched.bounced is not None:
            self._bounce.copy(*launched.bounced)

    def _end(self, job: Job, error: Exception | None) -> None:
        if error is None or isinstance(error, DeviceError):
            job.end(error)
        else:
            failure = DeviceError(f"blocks were not copied: {error}")
            failure.__cause__ = error.with_traceback(None)  # its frames know the host's memory
            job.end(failure)
        job.host = _NOTHING  # who knows the copy is not to keep the memory
        self._under_way.discard(job)

    def _drain(self) -> None:
        """Wait for all that was launched; where even that fails, nothing goes on."""
        with suppress(Exception):
            self._pages.synchronize()
            self._wire.synchronize()


class Outward(Lane):
    """Saves: gather, copy to the host, and from pinned memory to where it belongs."""

    def _launch(self, job: Job, part: Part, slot: Slot, *, is_last: bool) -> Launched:
        staging = slot.staging[: part.end - part.begin]
        with job.lock:
            self._check(job)
            with self._runtime.stream(self._pages):
                if not job.launched:
                    self._pages.wait_event(job.after)
                rows = self._send_rows(job, slot)
                for pages, shaped in _shaped(part, staging, len(job.blocks)):
                    torch.index_select(pages, 1, rows, out=shaped)
                read = self._event(self._pages)
            job.launched += 1
            job.reading = read
            job.lock.notify_all()
        whole, near = self._host_of(job, part, slot)
        with self._runtime.stream(self._wire):
            self._wire.wait_event(read)
            near.copy_(staging, non_blocking=True)
            done = self._event(self._wire)
        return Launched(job, is_last, slot, read, done, None if near is whole else (whole, near))


class Inward(Lane):
    """Loads: to pinned memory, where the host's is not, to the device, and into blocks."""

    def _launch(self, job: Job, part: Part, slot: Slot, *, is_last: bool) -> Launched:
        self._check(job)
        staging = slot.staging[: part.end - part.begin]
        whole, near = self._host_of(job, part, slot)
        if near is not whole:
            self._bounce.copy(near, whole)
        with self._runtime.stream(self._wire):
            staging.copy_(near, non_blocking=True)
            read = self._event(self._wire)
        with self._runtime.stream(self._pages):
            if not job.launched:
                self._pages.wait_event(job.after)  # what zeroes these blocks, or still writes to them
            self._pages.wait_event(read)
            rows = self._send_rows(job, slot)
            for pages, shaped in _shaped(part, staging, len(job.blocks)):
                for first, end in _kept(job.blocks):
                    pages.index_copy_(1, rows[first:end], shaped[:, first:end])
            done = self._event(self._pages)
        job.launched += 1
        return Launched(job, is_last, slot, read, done)


def _copy(to: torch.Tensor, source: torch.Tensor) -> None:
    with torch.inference_mode():
        to.copy_(source)


def _shaped(part: Part, staging: torch.Tensor, blocks: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The pages of a part, and the staging memory of each as (layers, blocks, words)."""
    begin = 0
    for pages in part.pages:
        layers, _, words = pages.shape
        end = begin + layers * blocks * words * pages.itemsize
        yield pages, staging[begin:end].view(pages.dtype).view(layers, blocks, words)
        begin = end


def _kept(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The runs of blocks that are to be written to."""
    for kept, run in groupby(enumerate(blocks), lambda item: item[1] != NO_BLOCK):
        if kept:
            numbers = [number for number, _ in run]
            yield numbers[0], numbers[-1] + 1
