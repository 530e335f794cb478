"""What an engine loses while blocks are copied beside it: products, replays of a graph, launches, small copies."""

import threading
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import torch

from .bandwidth import Moving
from .machine import Machine

SIZES = (1 << 20, 4 << 20, 32 << 20)
SECONDS = 1.5  # of each measurement


def measure(machine: Machine) -> dict[str, Any]:
    """By what runs beside it, what the engine gets of what it gets alone; times in microseconds, medians and 99 %."""
    engine = _Engine(machine)
    told: dict[str, Any] = {"alone": engine.measure()}
    for size in SIZES:
        for pinned in (True, False):
            moving = Moving(machine, size, pinned=pinned)
            for name, ways in (("saves", (moving.save,)), ("loads and saves", (moving.save, moving.load))):
                with _Beside(ways):
                    row = engine.measure()
                row["of_alone"] = {
                    what: round(row[what] / told["alone"][what], 3) for what in ("products_per_s", "replays_per_s")
                }
                told[f"{name} of {size >> 20} MiB, {'pinned' if pinned else 'bounced'}"] = row
            moving.close()
    return told


class _Beside:
    """Copies in a thread, as long as it lasts."""

    def __init__(self, ways: tuple[Callable[[], Any], ...]):
        self._ways = ways
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            for copy in [copy for way in self._ways for copy in way()]:
                copy.done.result(60)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


class _Engine:
    """What an engine does on its own stream."""

    def __init__(self, machine: Machine):
        self._machine = machine
        side = 4096 if machine.is_real else 16
        dtype = torch.bfloat16 if machine.is_real else torch.float32
        self._x = torch.randn(side, side, device=machine.name, dtype=dtype)
        self._out = torch.empty_like(self._x)
        self._small = torch.zeros(256, dtype=torch.int32, device=machine.name)
        self._host = machine.host(1024, pinned=True).view(torch.int32)
        self._replay: Callable[[], None] = lambda: torch.mm(self._x, self._x, out=self._out)
        if machine.is_real:
            self._replay()
            machine.wait()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(4):
                    torch.mm(self._x, self._x, out=self._out)
            self._replay = graph.replay

    def measure(self) -> dict[str, Any]:
        launches, copies = self._times(lambda: self._small.add_(1)), self._times(self._sample)
        return {
            "products_per_s": self._rate(lambda: torch.mm(self._x, self._x, out=self._out)),
            "replays_per_s": self._rate(self._replay),
            "launch_us": launches,
            "small_copy_us": copies,
        }

    def _sample(self) -> None:
        """A sampled token on its way to the host."""
        self._host.copy_(self._small, non_blocking=True)
        if self._machine.is_real:
            torch.cuda.current_stream().synchronize()

    def _rate(self, call: Callable[[], object]) -> float:
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < SECONDS / self._machine.scale:
            for _ in range(8):
                call()
            count += 8
            if self._machine.is_real:
                torch.cuda.current_stream().synchronize()
        return round(count / (time.perf_counter() - began), 1)

    def _times(self, call: Callable[[], object]) -> list[float]:
        times = []
        end = time.perf_counter() + SECONDS / 4 / self._machine.scale
        while len(times) < 100 or time.perf_counter() < end:
            began = time.perf_counter()
            call()
            times.append((time.perf_counter() - began) * 1e6)
        return [round(median(times), 1), round(quantiles(times, n=100)[98], 1)]
