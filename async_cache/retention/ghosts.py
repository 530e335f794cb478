"""What has left, by digest, for a while: that it comes back so soon tells a policy something."""


class Ghosts:
    """Digests in the order in which they left, the first of which are forgotten."""

    def __init__(self) -> None:
        self._digests: dict[bytes, None] = {}

    def __len__(self) -> int:
        return len(self._digests)

    def add(self, digest: bytes, most: int) -> None:
        """Remember a digest, and no more than so many of them."""
        self._digests[digest] = None
        while len(self._digests) > most:
            del self._digests[next(iter(self._digests))]

    def take(self, digest: bytes) -> bool:
        """Whether it is remembered; it is not any more."""
        return self._digests.pop(digest, self) is None
