"""Memory has one owner at a time: nothing is put where a load, gated, cancelled or past its timeout, may still write,
where a write-back or an entered read still reads, or where the views of a writer still are."""

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy
import pytest

from async_cache import ObjectKey
from async_cache.l2.backend import LoadOutcome
from async_cache.testing import WrappedBackend

from .interleaving import REPLAY, ShuffledLoop, run, seeds
from .program import Program, Rough, must

REACHED = {
    "loads",
    "loads given up",
    "stores",
    "stores given up",
    "objects read",
    "writers swept",
    "write-backs dropped",
}


@dataclass(eq=False)
class Claim:
    """Memory that somebody owns; only a reader shares it. `content` is what must stay there, as long as it is owned."""

    view: memoryview
    exclusive: bool
    content: bytes | None = None

    def __post_init__(self) -> None:
        self.begin: int = numpy.frombuffer(self.view, numpy.uint8).__array_interface__["data"][0]
        self.end = self.begin + len(self.view)

    def check(self) -> None:
        must(self.content is None or bytes(self.view) == self.content, "what is owned has changed")


class CanaryBackend(WrappedBackend):
    """Puts a canary into the buffers of a load, has the load done elsewhere, and looks whether it lives. A call that is
    cancelled, or fails, leaves garbage."""

    def __init__(self, inner: Rough, program: "CanaryProgram"):
        super().__init__(inner)
        self.rough, self.program = inner, program

    def lookup_nowait(self, chunk_hashes: Sequence[bytes], objects: Sequence[tuple[int, int]]) -> list[bool] | None:
        return self.rough.lookup_nowait(chunk_hashes, objects)

    async def load(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[LoadOutcome]:
        for buffer in buffers:
            buffer[:] = self.program.random.randbytes(len(buffer))
        bodies = [memoryview(bytearray(b"\xee" * len(buffer))) for buffer in buffers]
        try:
            with self.program.owned(buffers, exclusive=True):
                return await super().load(keys, bodies)
        finally:
            for buffer, body in zip(buffers, bodies, strict=True):
                buffer[:] = body

    async def store(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[bool]:
        with self.program.owned(buffers, exclusive=False):
            return await super().store(keys, buffers)


class CanaryProgram(Program):
    """All is rough; and between any two steps it looks at who owns what."""

    def __init__(self, loop: ShuffledLoop, reached: Counter[str]):
        self.calls: list[Claim] = []
        super().__init__(loop, reached, lambda backend: CanaryBackend(backend, self))
        self.rough = True
        for backend in self.backends:
            backend.stubborn = True

    @contextmanager
    def owned(self, buffers: Sequence[memoryview], *, exclusive: bool) -> Iterator[None]:
        claims = [Claim(buffer, exclusive, bytes(buffer)) for buffer in buffers]
        call, what = asyncio.current_task(), "loads" if exclusive else "stores"
        self.calls += claims
        self.reached[what] += 1
        try:
            yield
        finally:
            self.reached[f"{what} given up"] += call is not None and call.cancelling() > 0
            for claim in claims:
                self.calls.remove(claim)

    def between(self) -> None:
        super().between()
        reads = [view for lease, _, _ in self.leases for chunk in lease for view in chunk.views if view is not None]
        writes = [view for views in self.filling for view in views]
        claims = [*self.calls, *(Claim(v, False) for v in reads), *(Claim(v, True) for v in writes)]
        end = exclusive_end = 0
        for claim in sorted(claims, key=lambda claim: claim.begin):
            claim.check()
            must(claim.begin >= (end if claim.exclusive else exclusive_end), "memory has two owners")
            end = max(end, claim.end)
            if claim.exclusive:
                exclusive_end = max(exclusive_end, claim.end)


@pytest.mark.timeout(1800)
def test_memory_is_not_reused_while_somebody_owns_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    reached: Counter[str] = Counter()
    for seed in seeds(quick=400, long=10_000):
        run(seed, lambda loop: CanaryProgram(loop, reached).main())
        assert not caplog.records, f"{REPLAY}={seed}: what went wrong was only logged"
    if REPLAY not in os.environ:
        seldom = {what: reached[what] for what in REACHED if reached[what] < 5}
        assert not seldom, f"too seldom to prove anything: {seldom}"
