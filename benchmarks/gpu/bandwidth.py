"""How fast blocks are copied, beside one bare copy of pinned memory of the same size. All in GB/s."""

from collections.abc import Sequence
from typing import Any

import torch

from async_cache import ModelLayout, ObjectGroup
from async_cache.integrations.paged import Geometry, Pages
from async_cache.integrations.paged.device import Copy

from .machine import Machine

LAYERS, BLOCKS_EACH = 32, 16  # of an object
SIZES = (1 << 20, 4 << 20, 16 << 20, 32 << 20, 64 << 20)
COUNT = 16  # copies at a time


class Moving:
    """Objects of a size in blocks of a device's pages, and as many in the host's memory."""

    def __init__(self, machine: Machine, size_bytes: int, *, pinned: bool, **more: Any):
        self.machine = machine
        page = max(8, size_bytes // machine.scale // LAYERS // BLOCKS_EACH)
        self.size_bytes = page * LAYERS * BLOCKS_EACH
        names = tuple(map(str, range(LAYERS)))
        group = ObjectGroup((LAYERS, BLOCKS_EACH, page), "uint8")
        where = Geometry(ModelLayout("measured", (group,), chunk_tokens=256), (Pages(0, 16, names),))
        blocks = 1 + 2 * COUNT * BLOCKS_EACH
        whole = torch.zeros(LAYERS, blocks, page, dtype=torch.uint8, device=machine.name)
        self.device = machine.over(where, dict(zip(names, whole, strict=True)), pin_bytes=0, **more)
        scattered = (torch.randperm(blocks - 1) + 1).tolist()
        self.tables = [scattered[n * BLOCKS_EACH : (n + 1) * BLOCKS_EACH] for n in range(2 * COUNT)]
        self.hosts = [machine.host(self.size_bytes, pinned=pinned).view(group.shape) for _ in range(2 * COUNT)]
        if pinned:  # torch has pinned it
            self.device._pins._pieces |= {host.data_ptr(): (self.size_bytes, memoryview(b"")) for host in self.hosts}

    def save(self) -> list[Copy]:
        return [self.device.save(0, self.tables[n], self.hosts[n], self.device.mark()) for n in range(COUNT)]

    def load(self) -> list[Copy]:
        sides = range(COUNT, 2 * COUNT)
        return [self.device.load(0, self.tables[n], self.hosts[n], self.device.mark()) for n in sides]

    def rate(self, *ways: Any) -> float:
        """GB/s of a direction, or of each of two at a time."""

        def run() -> None:
            for copy in [copy for way in ways for copy in way()]:
                copy.done.result(60)

        run()
        return round(COUNT * self.size_bytes / self.machine.best_seconds(run) / 1e9, 2)

    def close(self) -> None:
        self.device._pins._pieces.clear()
        self.device.close()


def bare(machine: Machine, size_bytes: int, *, pinned: bool, ways: Sequence[str]) -> float:
    """GB/s of copies of one contiguous tensor each, of a direction, or of each of two at a time."""
    size_bytes = max(4096, size_bytes // machine.scale)
    hosts = {way: machine.host(size_bytes, pinned=pinned) for way in ways}
    devices = {way: torch.zeros(size_bytes, dtype=torch.uint8, device=machine.name) for way in ways}
    streams = {way: machine.runtime.Stream(devices[way].device) for way in ways}

    def run() -> None:
        for _ in range(COUNT):
            for way in ways:
                with machine.runtime.stream(streams[way]):
                    pair = (hosts[way], devices[way]) if way == "out" else (devices[way], hosts[way])
                    pair[0].copy_(pair[1], non_blocking=True)

    return round(COUNT * size_bytes / machine.best_seconds(run) / 1e9, 2)


def measure(machine: Machine) -> dict[str, Any]:
    """By size of an object and way: ours, and the bare copy."""
    told: dict[str, Any] = {}
    for size in SIZES:
        row: dict[str, Any] = {
            "bare": {
                "out": bare(machine, size, pinned=True, ways=["out"]),
                "in": bare(machine, size, pinned=True, ways=["in"]),
                "both": bare(machine, size, pinned=True, ways=["out", "in"]),
                "pageable_in": bare(machine, size, pinned=False, ways=["in"]),
            }
        }
        for name, options in (
            ("direct", {"pinned": True}),
            *((f"bounced_{n}", {"pinned": False, "bounce_threads": n}) for n in (1, 2, 4)),
        ):
            moving = Moving(machine, size, **options)
            rates = {"out": moving.rate(moving.save), "in": moving.rate(moving.load)}
            row[name] = rates | {"both": moving.rate(moving.save, moving.load)}
            moving.close()
        told[f"{size >> 20} MiB"] = row
    told["gather"] = _gather(machine)
    return told


def _gather(machine: Machine) -> dict[str, float]:
    """The rate of the indexed copy alone, by the type that the bytes are copied as."""
    rates, blocks = {}, 512
    page = max(64, (64 << 10) // machine.scale)
    for dtype in (torch.uint8, torch.int64):
        pages = torch.zeros(LAYERS, blocks, page // dtype.itemsize, dtype=dtype, device=machine.name)
        rows = torch.randperm(blocks, device=machine.name)[: blocks // 2]
        out = torch.empty(LAYERS, blocks // 2, page // dtype.itemsize, dtype=dtype, device=machine.name)
        seconds = machine.best_seconds(lambda: torch.index_select(pages, 1, rows, out=out))  # noqa: B023
        rates[str(dtype)] = round(out.nbytes / seconds / 1e9, 1)
    return rates
