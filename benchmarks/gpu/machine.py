"""The machine that is measured: a GPU, or in a rehearsal, a CPU that stands for one."""

import ctypes
import os
import platform
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from async_cache import ModelLayout
from async_cache.integrations.paged import Geometry, Pages
from async_cache.integrations.paged.cuda import CudaDevice
from tests.integrations.fake_cuda import FakeRuntime
from tests.integrations.layouts import LAYERS, Arrangement

_ATTRIBUTES = {
    "can register host memory": 99,
    "pageable memory uses the host's page tables": 100,
    "can register read-only host memory": 113,
}


@dataclass(frozen=True)
class Machine:
    """`scale`: sizes and repetitions are divided by it."""

    runtime: Any
    name: str
    scale: int = 1

    @classmethod
    def found(cls) -> "Machine | None":
        """The GPU of this machine; None without one."""
        return cls(torch.cuda, "cuda:0") if torch.cuda.is_available() else None

    @classmethod
    def rehearsed(cls) -> "Machine":
        """A CPU."""
        return cls(FakeRuntime(), "cpu", scale=1024)

    @property
    def is_real(self) -> bool:
        """Whether there is a GPU."""
        return self.runtime is torch.cuda

    def device(self, arrangement: Arrangement, caches: list[torch.Tensor], **more: Any) -> CudaDevice:
        """A device over the pages of some layers, four blocks an object."""
        layout = ModelLayout("measured", (arrangement.group(),), chunk_tokens=4 * arrangement.tokens)
        where = Geometry(layout, (Pages(0, arrangement.tokens, tuple(map(str, range(LAYERS)))),))
        return self.over(where, {str(layer): cache for layer, cache in enumerate(caches)}, **more)

    def over(self, where: Geometry, caches: Mapping[str, torch.Tensor], **more: Any) -> CudaDevice:
        """A device over these pages."""
        return CudaDevice(where, caches, runtime=self.runtime, pinned=self.is_real, **more)

    def host(self, size_bytes: int, *, pinned: bool) -> torch.Tensor:
        """Memory of the host."""
        return torch.zeros(size_bytes, dtype=torch.uint8, pin_memory=pinned and self.is_real)

    def wait(self) -> None:
        """Until everything that was launched has ended."""
        if self.is_real:
            torch.cuda.synchronize()

    def best_seconds(self, call: Callable[[], object], rounds: int = 5) -> float:
        """The least time that a call takes, with all that it has launched."""
        best = float("inf")
        for _ in range(rounds):
            self.wait()
            began = time.perf_counter()
            call()
            self.wait()
            best = min(best, time.perf_counter() - began)
        return best


def facts(machine: Machine) -> dict[str, Any]:
    """What the numbers hang on."""
    told: dict[str, Any] = {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
    }
    if machine.is_real:
        told |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        driver = ctypes.CDLL("libcuda.so.1")
        version, value = ctypes.c_int(), ctypes.c_int()
        driver.cuDriverGetVersion(ctypes.byref(version))
        told["driver"] = version.value
        for name, attribute in _ATTRIBUTES.items():
            error = driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
            told[name] = value.value if not error else f"error {error}"
    return told
