"""Checks of what callers give, for the cache and for its clients."""

import math
import re
from collections.abc import Sequence
from typing import Any

from async_cache.prompt.layout import Prompt, check_ranks


def check_prompt(prompt: Prompt) -> None:
    """Check that it is a prompt. Raises TypeError."""
    if not isinstance(prompt, Prompt):
        raise TypeError(f"prompt must come from ModelLayout.prompt, not be a {type(prompt).__name__}")


def check_request_id(request_id: str, longest: int) -> str:
    """Check that a request id is text of 1 to `longest` characters, and return it. Raises TypeError or ValueError."""
    check_text("request_id", request_id, longest, least=1)
    return request_id


def check_text(name: str, text: str, longest: int, *, least: int = 0) -> None:
    """Check that it is text of so many characters. Raises TypeError or ValueError."""
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a str, not {type(text).__name__}")
    if not least <= len(text) <= longest:
        raise ValueError(f"{name} must have {least} to {longest} characters, not {len(text)}")


def check_seconds(name: str, seconds: float | None) -> None:
    """Check for None, or a finite number that is not negative. Raises TypeError or ValueError."""
    if seconds is None:
        return
    if type(seconds) not in (int, float):
        raise TypeError(f"{name} must be a number, not {type(seconds).__name__}")
    if not (seconds >= 0 and math.isfinite(seconds)):
        raise ValueError(f"{name} must be a finite number of seconds, not {seconds}")


_TRACEPARENT = re.compile("[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def check_traceparent(traceparent: str | None) -> None:
    """Check for None, or a `traceparent` in the form of W3C. Raises TypeError or ValueError."""
    if traceparent is None:
        return
    check_text("traceparent", traceparent, 55, least=55)
    if not _TRACEPARENT.fullmatch(traceparent):
        raise ValueError(f"traceparent must be as 00-<32 digits>-<16 digits>-<2 digits>, not {traceparent!r}")


def check_capacity(capacity: int) -> int:
    """Check that it is a number of events, from 1 on, and return it. Raises TypeError or ValueError."""
    if type(capacity) is not int:
        raise TypeError(f"capacity must be an int, not {type(capacity).__name__}")
    if not 1 <= capacity < 2**32:
        raise ValueError(f"capacity must be from 1 to 2**32 - 1, not {capacity}")
    return capacity


def start_of(prompt: Prompt, skip_tokens: int) -> int:
    """The chunk at which a prefetch begins that skips so many tokens. Raises TypeError or ValueError."""
    if type(skip_tokens) is not int:
        raise TypeError(f"skip_tokens must be an int, not {type(skip_tokens).__name__}")
    if skip_tokens < 0:
        raise ValueError(f"skip_tokens must not be negative, got {skip_tokens}")
    return min(skip_tokens // prompt.layout.chunk_tokens, len(prompt))


def ranks_of(prompt: Prompt, ranks: Sequence[int] | None) -> tuple[int, ...]:
    """The ranks that a prefetch loads, ascending; all if None. Raises TypeError or ValueError."""
    world_size = prompt.layout.world_size
    return tuple(range(world_size)) if ranks is None else check_ranks(ranks, world_size)


def check_tier(tier: Any) -> None:
    """Check that it is one of the two ways to clear. Raises ValueError."""
    if tier not in ("l1", "all"):
        raise ValueError(f'tier must be "l1" or "all", not {tier!r}')
