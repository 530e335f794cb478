"""What can be pinned, what that takes, and for how long it holds up launches."""

import mmap
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from async_cache.integrations.paged.pins import Pins
from async_cache.memory.mapping import make_memfd, map_read_only, seal_new_writers, seal_size

from .machine import Machine

READ_ONLY = 8
SIZES = (4096, 64 << 20)


@contextmanager
def memory(kind: str, size_bytes: int) -> Iterator[memoryview]:
    """Memory of a kind: our own shared map, another one's that we can only read, or anonymous. All pages are there."""
    if kind == "anonymous":
        with mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as made:
            made[:] = b"x" * size_bytes
            yield (view := memoryview(made))
            view.release()
        return
    fd = make_memfd("measured")
    os.ftruncate(fd, size_bytes)
    seal_size(fd)
    own = mmap.mmap(fd, size_bytes)
    own[:] = b"x" * size_bytes
    if kind == "sealed":
        seal_new_writers(fd)
    view = map_read_only(fd, size_bytes) if kind == "sealed" else memoryview(own)
    try:
        yield view
    finally:
        view.release()
        own.close()
        os.close(fd)


def address(view: memoryview) -> int:
    return torch.frombuffer(view, dtype=torch.uint8).data_ptr()


def matrix(machine: Machine) -> dict[str, Any]:
    """By kind of memory, flags and size: CUDA's error, 0 where it can be pinned; and what a failure leaves behind."""
    cudart, told = machine.runtime.cudart(), {}
    for kind in ("shared", "sealed", "anonymous"):
        for flags in (0, READ_ONLY):
            for size in SIZES:
                size = max(4096, size // machine.scale)
                with memory(kind, size) as view:
                    at = address(view)
                    error = int(cudart.cudaHostRegister(at, size, flags))
                    is_pinned = machine.is_real and torch.frombuffer(view, dtype=torch.uint8).is_pinned()
                    if not error:
                        cudart.cudaHostUnregister(at)
                told[f"{kind}, flags {flags}, {size} bytes"] = {"error": error, "is_pinned": is_pinned}
    told["a launch after a failure"] = _launch_after_failure(machine)
    told["a copy across two pieces"] = _crossing(machine)
    return told


def _launch_after_failure(machine: Machine) -> str:
    """Whether a failure stays pending and comes up in the next launch of the same thread."""
    machine.runtime.cudart().cudaHostRegister(0, 4096, 0)
    try:
        torch.ones(8, device=machine.name).add_(1).sum().item()
    except RuntimeError as error:
        return f"raises: {str(error).splitlines()[0]}"
    return "goes on"


def _crossing(machine: Machine) -> str:
    piece = 1 << 20
    pins = Pins(machine.runtime, torch.device(machine.name), piece)
    with memory("shared", 2 * piece) as view:
        pins.add(view, writable=True).join()
        host = torch.frombuffer(view, dtype=torch.uint8)[piece // 2 : piece // 2 + piece]
        try:
            torch.zeros(piece, dtype=torch.uint8, device=machine.name).copy_(host, non_blocking=True)
            machine.wait()
            told = "goes on"
        except RuntimeError as error:
            told = f"raises: {str(error).splitlines()[0]}"
        del host
        pins.close()
    return told


def seconds(machine: Machine) -> dict[str, Any]:
    """Seconds to pin a GiB, in pieces of two sizes, and the longest that a launch took meanwhile, in milliseconds."""
    told, total = {}, (1 << 30) // machine.scale
    for piece in (64 << 20, 1 << 30):
        piece = max(4096, piece // machine.scale)
        with memory("shared", total) as view:
            cudart, base = machine.runtime.cudart(), address(view)
            stop, worst = threading.Event(), [0.0]

            def launch(stop: threading.Event = stop, worst: list[float] = worst) -> None:
                one = torch.ones(1, device=machine.name)
                while not stop.is_set():
                    began = time.perf_counter()
                    one.add_(1)
                    worst[0] = max(worst[0], time.perf_counter() - began)
                    time.sleep(0.0002)

            thread = threading.Thread(target=launch)
            thread.start()
            time.sleep(0.2)
            alone, worst[0] = worst[0], 0.0
            began, errors = time.perf_counter(), set()
            for at in range(0, total, piece):
                errors.add(int(cudart.cudaHostRegister(base + at, min(piece, total - at), 0)))
            took = time.perf_counter() - began
            stop.set()
            thread.join()
            for at in range(0, total, piece):
                cudart.cudaHostUnregister(base + at)
        told[f"pieces of {piece} bytes"] = {
            "seconds_per_gib": round(took * (1 << 30) / total, 3),
            "worst_launch_ms": round(worst[0] * 1000, 2),
            "worst_launch_alone_ms": round(alone * 1000, 2),
            "errors": sorted(errors),
        }
    return told
