"""A device in virtual time: it copies, it takes as long as it is told to, and it breaks where it is told to.

It has what a GPU has: the stream of an engine, staging slots for each direction, a gather engine, and a copy engine
for each direction. Bytes move when a stage ends; what is released is poisoned: who looks too early or late, sees it.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from async_cache.integrations.paged.device import Copy, DeviceError, Fence, Mark
from async_cache.integrations.paged.orders import NO_BLOCK

POISON = 0xEE

Pages = list[torch.Tensor]
"""The pages of each layer of a group: block numbers first."""
Stages = Callable[["Job"], Coroutine[Any, Any, None]]


def poison(tensor: torch.Tensor) -> None:
    tensor.view(-1).view(torch.uint8).fill_(POISON)


class Engine:
    """A part of a device that does one thing after the other, at so many bytes a second."""

    def __init__(self, bytes_per_second: float, jitter: Callable[[], float]):
        self._bytes_per_second = bytes_per_second
        self._jitter = jitter
        self._turn = asyncio.Lock()
        self.resumed = asyncio.Event()
        self.busy_seconds = 0.0

    async def run(self, size_bytes: int, step: Callable[[], object], *, hangs: bool) -> None:
        async with self._turn:
            seconds = size_bytes / self._bytes_per_second * self._jitter()
            if hangs:
                await self.resumed.wait()
            await asyncio.sleep(seconds)
            self.busy_seconds += seconds
            step()


@dataclass
class Job:
    """One copy: whether it has begun to read, or was given up before."""

    direction: str
    read: Fence = field(default_factory=Future)
    done: Fence = field(default_factory=Future)
    begun: bool = False

    def end(self, error: BaseException | None = None) -> None:
        for fence in (self.read, self.done):
            if not fence.done():
                fence.set_exception(error) if error is not None else fence.set_result(None)


class SimulatedDevice:
    """A `Device` on the running loop. `fails` and `hangs`: the numbers of the stages that do, counted as they begin."""

    pin_bytes = 4096

    def __init__(
        self,
        groups: Sequence[Pages],
        *,
        bytes_per_second: float = 1e6,
        gather_bytes_per_second: float = 1e8,
        latency_seconds: float = 1e-5,
        slots: int = 3,
        jitter: float = 0.0,
        fails: int | None = None,
        hangs: int | None = None,
    ):
        self.groups = groups
        chance = random.Random(1)
        draw = partial(chance.uniform, 1 - jitter, 1 + jitter)
        self.gather = Engine(gather_bytes_per_second, draw)
        self.way = {"out": Engine(bytes_per_second, draw), "in": Engine(bytes_per_second, draw)}
        self._slots = {"out": asyncio.Semaphore(slots), "in": asyncio.Semaphore(slots)}
        self._order = {"out": asyncio.Lock(), "in": asyncio.Lock()}
        self._latency_seconds = latency_seconds
        self._fails, self._hangs = fails, hangs
        self.stages = 0
        self.moved = {"out": 0, "in": 0}
        self.ended_at = {"out": 0.0, "in": 0.0}
        self.pinned: list[tuple[memoryview, bool]] = []
        self._jobs: dict[int, Job] = {}  # by the identity of its first fence: those that have begun
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._submitted: asyncio.Future[None] = _resolved()  # what the engine has submitted so far
        self._held: list[Fence] = []
        self.waited_seconds = 0.0
        """How long the engine's stream had nothing to do but to wait for copies."""

    # The engine's stream.

    def compute(self, seconds: float, step: Callable[[], None] = lambda: None) -> "asyncio.Future[None]":
        """Submit a step, which takes so long, and changes pages when it ends."""
        loop, before, held = asyncio.get_running_loop(), self._submitted, self._held
        self._submitted, self._held = loop.create_future(), []
        ended = self._submitted

        async def run() -> None:
            await before
            ready_at = loop.time()
            for fence in held:
                await asyncio.wait([asyncio.wrap_future(fence)])
            self.waited_seconds += loop.time() - ready_at
            await asyncio.sleep(seconds)
            step()
            if not ended.cancelled():
                ended.set_result(None)

        self._keep(run())
        return ended

    def mark(self) -> Mark:
        return self._submitted

    def hold(self, copies: Iterable[Copy]) -> None:
        for copy in copies:
            job = self._jobs[id(copy.read)]  # it has begun here, or there is nothing to wait for
            assert job.direction == "out"
            if not job.begun:
                job.end(DeviceError("given up: the engine needs its blocks"))
            elif not job.read.done():
                self._held.append(job.read)

    # Copies.

    def pin(self, view: memoryview, *, writable: bool) -> None:
        self.pinned.append((view, writable))

    def save(self, group: int, blocks: Sequence[int], host: torch.Tensor, after: Mark) -> Copy:
        assert host.is_contiguous() and NO_BLOCK not in blocks
        return self._begin("out", partial(self._save, group, list(blocks), host), after)

    def load(self, group: int, blocks: Sequence[int], host: torch.Tensor, after: Mark) -> Copy:
        assert host.is_contiguous() and len(blocks) == host.shape[1]
        return self._begin("in", partial(self._load, group, list(blocks), host), after)

    def _begin(self, direction: str, stages: Stages, after: Mark) -> Copy:
        assert isinstance(after, asyncio.Future)
        if self._closed:
            raise DeviceError("the device is closed")
        job = Job(direction)
        self._jobs[id(job.read)] = job
        self._keep(self._run(job, stages, after))
        return Copy(job.read, job.done)

    async def _run(self, job: Job, stages: Stages, after: "asyncio.Future[None]") -> None:
        try:
            async with self._order[job.direction]:  # until it has a slot: copies begin in order
                await asyncio.shield(after)
                await self._slots[job.direction].acquire()
            try:
                if not job.done.done():
                    await asyncio.sleep(self._latency_seconds)
                    if not job.done.done():
                        job.begun = True
                        await stages(job)
            finally:
                self._slots[job.direction].release()
        except DeviceError as error:
            job.end(error.with_traceback(None))  # whose frames know the host's memory
        except asyncio.CancelledError:
            job.end(DeviceError("the device is closed"))
            raise

    async def _save(self, group: int, blocks: list[int], host: torch.Tensor, job: Job) -> None:
        staging = torch.empty_like(host)
        await self._stage(self.gather, host.nbytes, partial(_gather, self.groups[group], blocks, staging))
        job.read.set_result(None)
        await self._stage(self.way["out"], host.nbytes, partial(host.copy_, staging))
        self._count("out", host.nbytes)
        poison(staging)
        job.done.set_result(None)

    async def _load(self, group: int, blocks: list[int], host: torch.Tensor, job: Job) -> None:
        staging = torch.empty_like(host)
        await self._stage(self.way["in"], host.nbytes, partial(staging.copy_, host))
        self._count("in", host.nbytes)
        job.read.set_result(None)
        await self._stage(self.gather, host.nbytes, partial(_scatter, self.groups[group], blocks, staging))
        poison(staging)
        job.done.set_result(None)

    async def _stage(self, engine: Engine, size_bytes: int, step: Callable[[], object]) -> None:
        number, self.stages = self.stages, self.stages + 1
        if number == self._fails:
            raise DeviceError(f"stage {number} failed")
        await engine.run(size_bytes, step, hangs=number == self._hangs)

    def _count(self, direction: str, size_bytes: int) -> None:
        self.moved[direction] += size_bytes
        self.ended_at[direction] = asyncio.get_running_loop().time()

    def close(self) -> None:
        self._closed = True
        for task in self._tasks:
            task.cancel()
        for job in self._jobs.values():
            job.end(DeviceError("the device is closed"))

    def resume(self) -> None:
        """Let what hangs go on."""
        for engine in (self.gather, *self.way.values()):
            engine.resumed.set()

    def _keep(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _resolved() -> "asyncio.Future[None]":
    future = asyncio.get_running_loop().create_future()
    future.set_result(None)
    return future


def _gather(pages: Pages, blocks: Sequence[int], staging: torch.Tensor) -> None:
    for cache, part in zip(pages, staging, strict=True):
        part.copy_(cache[blocks].view(part.shape))


def _scatter(pages: Pages, blocks: Sequence[int], staging: torch.Tensor) -> None:
    kept = [n for n, block in enumerate(blocks) if block != NO_BLOCK]
    for cache, part in zip(pages, staging, strict=True):
        cache[[blocks[n] for n in kept]] = part[kept].view(-1, *cache.shape[1:])
