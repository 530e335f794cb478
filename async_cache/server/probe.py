"""How long the event loop is held at a time, and by what: a thread asks it, and looks when it is silent."""

import asyncio
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from async_cache.values import Hold

_ASK_SECONDS = 0.01
_IDLE_ASK_SECONDS = 0.08  # apart, in the end, where it has nothing to do
_IDLE_PART = 0.02  # of the time: a loop that computes for less has nothing to do
_SILENT_SECONDS = 0.01  # then it is held: who looks now sees by what
_RECENT_SECONDS = 60.0
_FRAMES = 3  # that are told of
_ELSEWHERE = "somewhere else"  # than in this package
_PACKAGE = str(Path(__file__).parents[1])


class Probe:
    """Asks the running loop from `open` until `close`: a hundred times a second, and less often while it is idle."""

    def __init__(self) -> None:
        self.longest = Hold()
        """Of all, by how long the loop computed: on a machine that others use, too, every loop waits at times."""
        self.held = 0
        """How often the loop computed for more than ten milliseconds before it answered."""
        self._latest: list[
            tuple[float, Hold]
        ] = []  # the longest of late, and those that came after it, which are shorter
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._answered = threading.Event()
        self._answer_at = (0.0, 0.0)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Begin to ask."""
        self._thread = threading.Thread(target=self._run, name="async_cache probe", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ask no more; idempotent. The thread ends by itself."""
        self._stop.set()
        self._answered.set()

    @property
    def recent(self) -> Hold:
        """The longest of the last minute."""
        now = time.monotonic()
        return next((hold for at, hold in list(self._latest) if at > now - _RECENT_SECONDS), Hold())

    def _run(self) -> None:
        clock = time.pthread_getcpuclockid(self._loop_thread)
        computed_by_then, apart = time.clock_gettime(clock), _ASK_SECONDS
        while not self._stop.wait(apart):
            asked, computed = time.monotonic(), time.clock_gettime(clock)
            is_idle = computed - computed_by_then < _IDLE_PART * apart
            apart = min(2 * apart, _IDLE_ASK_SECONDS) if is_idle else _ASK_SECONDS
            self._answered.clear()
            try:
                self._loop.call_soon_threadsafe(self._answer)
            except RuntimeError:  # the loop was closed
                return
            where = ""
            while not self._answered.wait(_SILENT_SECONDS):
                if where in ("", _ELSEWHERE):
                    where = _where(sys._current_frames().get(self._loop_thread)) or _ELSEWHERE
            if not self._stop.is_set():
                at, computed_by_then = self._answer_at
                self._note(Hold(at - asked, computed_by_then - computed, where))

    def _answer(self) -> None:
        self._answer_at = time.monotonic(), time.thread_time()
        self._answered.set()

    def _note(self, hold: Hold) -> None:
        now = time.monotonic()
        self.held += hold.busy_seconds > _SILENT_SECONDS
        if hold.busy_seconds > self.longest.busy_seconds:
            self.longest = hold
        latest = [(at, other) for at, other in self._latest if at > now - _RECENT_SECONDS]
        while latest and latest[-1][1].busy_seconds <= hold.busy_seconds:
            latest.pop()
        self._latest = [*latest, (now, hold)]


def _where(frame: FrameType | None) -> str:
    """The functions of this package that run, the last one called first, with the line where that is."""
    names: list[str] = []
    while frame is not None and len(names) < _FRAMES:
        code = frame.f_code
        if code.co_filename.startswith(_PACKAGE):
            path = Path(code.co_filename).relative_to(_PACKAGE)
            names.append(f"{code.co_qualname} ({path}:{frame.f_lineno})")
        frame = frame.f_back
    return ", of ".join(names)
