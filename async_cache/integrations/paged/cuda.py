"""`CudaDevice`: pages on a GPU, through torch alone. Nothing of this has run on one: see docs/engines.md.

Its memory beside the pages is bounded: for each direction so many slots, of device memory and as much of the host's.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from async_cache.integrations.paged.device import Copy, Mark
from async_cache.integrations.paged.lanes import Bounce, Inward, Job, Outward, Part, Slot, parts_of
from async_cache.integrations.paged.orders import Geometry
from async_cache.integrations.paged.pins import Pins
from async_cache.integrations.paged.rows import rows_of


class CudaDevice:
    """A GPU as a `Device`, made in its engine's thread: from then on, nothing is called before the first copy.

    `caches` are the pages by layer, block numbers first. Raises ConfigError for pages that are no rows of bytes.
    `hold_seconds`: so long the engine waits, at most, until what reads its blocks is launched.
    `runtime` is `torch.cuda`, or what a test has for it.
    """

    def __init__(
        self,
        geometry: Geometry,
        caches: Mapping[str, torch.Tensor],
        *,
        slot_bytes: int = 32 << 20,
        slots: int = 3,
        bounce_threads: int = 2,
        pin_bytes: int = 256 << 20,
        hold_seconds: float = 0.01,
        runtime: Any = torch.cuda,
        pinned: bool = True,
    ):
        self.pin_bytes = pin_bytes
        rows = [
            rows_of([caches[layer] for layer in pages.layers], group) if pages.layers else []
            for pages, group in zip(geometry.pages, geometry.layout.groups, strict=True)
        ]
        blocks = [group.shape[1] for group in geometry.layout.groups]
        self._groups: list[list[Part]] = [
            parts_of(*it, slot_bytes) if it[0] else [] for it in zip(rows, blocks, strict=True)
        ]  # no parts: layers of another rank's
        most = max(part.end - part.begin for parts in self._groups for part in parts)
        self._device, self._runtime = next(row[0].device for row in rows if row), runtime
        self._hold_seconds = hold_seconds
        self._pins, self._bounce = Pins(runtime, self._device), Bounce(bounce_threads)
        self._out, self._in = (
            lane(
                name,
                runtime,
                self._device,
                [Slot(most, max(blocks), self._device, pinned=pinned) for _ in range(slots)],
                self._pins,
                self._bounce,
            )
            for name, lane in (("out", Outward), ("in", Inward))
        )
        # What the engine has given back may be in use on its stream still, and is staging memory by now.
        runtime.current_stream(self._device).synchronize()

    def mark(self) -> Mark:
        """An event behind what the engine has submitted to its current stream."""
        event = self._runtime.Event()
        event.record(self._runtime.current_stream(self._device))
        return event

    def hold(self, copies: Iterable[Copy]) -> None:
        """Have the engine's current stream wait for what is being gathered; what is not in a moment is given up."""
        end = time.monotonic() + self._hold_seconds
        for copy in copies:
            assert isinstance(copy, Job)
            with copy.lock:
                copy.lock.wait_for(lambda job=copy: job.has_launched, max(0, end - time.monotonic()))  # type: ignore[misc]
                copy.give_up()
                reading = copy.reading
            if reading is not None and not copy.read.done():
                self._runtime.current_stream(self._device).wait_event(reading)

    def pin(self, view: memoryview, *, writable: bool) -> None:
        """Begin to pin host memory, in a thread that launches nothing."""
        self._pins.add(view, writable=writable)

    def save(self, group: int, blocks: Sequence[int], host: torch.Tensor, after: Mark) -> Copy:
        """Begin to copy blocks out."""
        job = Job(parts=self._groups[group], blocks=blocks, host=host, after=after)
        self._out.begin(job)
        return job

    def load(self, group: int, blocks: Sequence[int], host: torch.Tensor, after: Mark) -> Copy:
        """Begin to copy into blocks, but for those that are NO_BLOCK."""
        job = Job(parts=self._groups[group], blocks=blocks, host=host, after=after)
        self._in.begin(job)
        return job

    def close(self) -> None:
        """Let what was launched end, and fail the rest. Memory that a stuck copy may use stays pinned."""
        ended = [lane.close() for lane in (self._out, self._in)]
        self._bounce.close()
        if all(ended):
            self._pins.close()
