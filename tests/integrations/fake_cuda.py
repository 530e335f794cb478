"""What `torch.cuda` is to a device, on a CPU: what is launched happens at once, and its events pass when they may."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class FakeRuntime:
    """`fails`: the number of the call that raises, of those that launch or wait. `gate`: events pass when it is set."""

    def __init__(self, *, fails: int | None = None, register: Any = None):
        self.calls = 0
        self.fails = fails
        self.threads: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.engine = FakeStream(self)
        self.register = register or (lambda address, size, flags: 0)
        self.registered: dict[int, int] = {}
        self.lock = threading.Lock()

    def called(self) -> None:
        with self.lock:
            number, self.calls = self.calls, self.calls + 1
            self.threads.add(threading.get_ident())
        if number == self.fails:
            raise RuntimeError(f"CUDA error: call {number}")

    def Stream(self, device: Any) -> "FakeStream":  # noqa: N802
        return FakeStream(self)

    def Event(self, blocking: bool = False) -> "FakeEvent":  # noqa: N802
        return FakeEvent(self)

    @contextmanager
    def stream(self, stream: "FakeStream") -> Iterator[None]:
        self.called()
        yield

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    def current_stream(self, device: Any) -> "FakeStream":
        return self.engine

    def cudart(self) -> "FakeRuntime":
        return self

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        error = int(self.register(address, size, flags))
        if not error:
            assert size > 0 and address not in self.registered
            self.registered[address] = size
        return error

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.registered[address]
        return 0


class FakeStream:
    def __init__(self, runtime: FakeRuntime):
        self._runtime = runtime
        self.waited_for: list[FakeEvent] = []
        self.waits = 0  # of the host

    def wait_event(self, event: "FakeEvent") -> None:
        assert event.recorded, "to wait for an event that is not recorded is not to wait"
        self.waited_for.append(event)

    def synchronize(self) -> None:
        self.waits += 1
        assert self._runtime.gate.wait(60)


class FakeEvent:
    def __init__(self, runtime: FakeRuntime):
        self._runtime = runtime
        self.recorded = False

    def record(self, stream: FakeStream) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded
        assert self._runtime.gate.wait(60)
        self._runtime.called()
