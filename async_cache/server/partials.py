"""Frames of one tenant that have begun: beside what all may have together, its own are bounded."""

from async_cache.protocol.partials import Partials, Receiver
from async_cache.server.accounts import Account


class TenantPartials:
    """Those of a tenant's connections, the oldest first, which makes room for the others."""

    def __init__(self, together: Partials, account: Account):
        self._together = together
        self._account = account
        self._frames: dict[Receiver, tuple[int, int]] = {}  # the number of each on its connection, and its bytes

    def keep(self, receiver: Receiver, number: int, size_bytes: int) -> None:
        """Know that so much is there of a frame; the one that its connection had before is complete."""
        before, before_bytes = self._frames.get(receiver, (-1, 0))
        if before != number:
            self._frames.pop(receiver, None)
        self._frames[receiver] = number, size_bytes
        self._account.used["partial_bytes"] += size_bytes - before_bytes
        self._together.keep(receiver, number, size_bytes, self.dropped)
        while self._account.used["partial_bytes"] > self._account.most["partial_bytes"]:
            oldest = next(iter(self._frames))
            self.drop(oldest)
            oldest.fail(self._account.over("partial_bytes", "and this is the oldest frame that is not complete"))

    def drop(self, receiver: Receiver) -> None:
        """Know that nothing is there of a frame."""
        if receiver in self._frames:
            self.dropped(receiver)
            self._together.drop(receiver)

    def dropped(self, receiver: Receiver) -> None:
        """Hear that it is not known any more with those of all tenants."""
        frame = self._frames.pop(receiver, None)
        if frame is not None:
            self._account.used["partial_bytes"] -= frame[1]
