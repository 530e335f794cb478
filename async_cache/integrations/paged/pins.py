"""`Pins`: host memory of others' that a GPU can copy from and to by itself, piece by piece.

A shared map of our own can be pinned while it is mapped; a private one must not be, since pinning it would part it
from what it is a map of. While a piece is being pinned, CUDA holds up every launch in the process, so pieces are small,
and there is time between them. What cannot be pinned is no error: copies go through memory that is.
"""

import logging
import threading
from contextlib import nullcontext
from typing import Any

import torch

log = logging.getLogger(__name__)

PIECE_BYTES = 64 << 20
_PAUSE_SECONDS = 0.05  # in which the engine launches what had to wait
_READ_ONLY = 8  # cudaHostRegisterReadOnly: for maps that cannot be written to


class Pins:
    """Pieces of memory, which a thread of its own pins: a failure of CUDA stays with the thread that it happens in.

    `runtime` is `torch.cuda`, or what a test has for it.
    """

    def __init__(self, runtime: Any, device: torch.device, piece_bytes: int = PIECE_BYTES):
        self._runtime, self._device = runtime, device
        self._piece_bytes = piece_bytes
        self._pieces: dict[int, tuple[int, memoryview]] = {}  # by address: the bytes, and what keeps them mapped
        self._closing = threading.Event()
        self._threads: dict[int, threading.Thread] = {}  # by the address of what they pin

    def add(self, view: memoryview, *, writable: bool) -> threading.Thread:
        """Begin to pin a view, once; the thread that does."""
        begin = torch.frombuffer(view, dtype=torch.uint8).data_ptr()
        thread = self._threads.get(begin)
        if thread is None:
            arguments = (begin, view, writable)
            thread = threading.Thread(target=self._pin, args=arguments, name="async_cache pin", daemon=True)
            thread.start()  # it raises where there can be no more threads
            self._threads[begin] = thread
        return thread

    def _pin(self, begin: int, view: memoryview, writable: bool) -> None:
        with self._runtime.device(self._device):  # else the first GPU gets a context, whichever is ours
            self._pin_pieces(begin, view, writable)

    def _pin_pieces(self, begin: int, view: memoryview, writable: bool) -> None:
        """Pin a piece after the other, until one cannot be."""
        for at in range(0, len(view), self._piece_bytes):
            if self._closing.wait(_PAUSE_SECONDS if at else 0):
                return
            size = min(self._piece_bytes, len(view) - at)
            error = 0
            for flags in (0,) if writable else (_READ_ONLY, 0):
                error = int(self._runtime.cudart().cudaHostRegister(begin + at, size, flags))
                if not error:
                    break
            if error:
                log.info("%d of %d bytes are pinned: the next ones cannot be (CUDA error %d)", at, len(view), error)
                return
            self._pieces[begin + at] = (size, view)

    def whole(self, address: int, size_bytes: int) -> bool:
        """Whether a range lies in one pinned piece: no copy may cross two."""
        pieces = list(self._pieces.items())  # at once: another thread adds to it
        return any(begin <= address and address + size_bytes <= begin + size for begin, (size, _) in pieces)

    def close(self) -> None:
        """Unpin everything; what cannot be unpinned stays mapped. No copy may be under way."""
        self._closing.set()
        for thread in self._threads.values():
            thread.join()
        with self._runtime.device(self._device) if self._pieces else nullcontext():
            for begin in list(self._pieces):
                if not int(self._runtime.cudart().cudaHostUnregister(begin)):
                    del self._pieces[begin]
