"""How much a test does: the quick part in `make test`, the long part in `make soak`, which sets SOAK to seconds."""

import os

SOAK_SECONDS = float(os.environ.get("SOAK", 0))


def rounds(quick: int, long: int) -> int:
    """How often to do it."""
    return long if SOAK_SECONDS else quick
