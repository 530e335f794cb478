"""`Recording`: the recorder that the settings want, if they want one."""

from pathlib import Path

from async_cache.observe import Observers
from async_cache.recording.recorder import Recorder

_CLOSE_SECONDS = 1.0


class Recording:
    """Records the requests of a cache where the settings say, from one `follow` to the next."""

    def __init__(self, observers: Observers):
        self._observers = observers
        self.recorder: Recorder | None = None
        """What records now."""

    async def follow(self, path: str, most_bytes: int) -> None:
        """Record there from now on; nowhere if the path is empty. Raises ConfigError, and goes on as before then."""
        before = self.recorder
        if before is not None and path == str(before.path):
            before.bound(most_bytes)
            return
        recorder = Recorder(Path(path), most_bytes) if path else None
        if recorder is not None:
            await recorder.open()
        await self.close()
        self.recorder = recorder
        if recorder is not None:
            self._observers.asking += (recorder.asked,)
            self._observers.hinting += (recorder.hinted,)

    async def close(self) -> None:
        """Record no more, once what was noted is written, or is given up; idempotent."""
        recorder, self.recorder = self.recorder, None
        if recorder is not None:
            observers = self._observers
            observers.asking = tuple(told for told in observers.asking if told != recorder.asked)
            observers.hinting = tuple(told for told in observers.hinting if told != recorder.hinted)
            await recorder.close(_CLOSE_SECONDS)
