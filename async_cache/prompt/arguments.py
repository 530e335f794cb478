"""Checks of what callers give, for the cache and for its clients."""

import re
import sys
from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from async_cache.prompt.layout import Prompt, check_ranks
from async_cache.prompt.objects import as_int, check_int
from async_cache.prompt.origin import Selection
from async_cache.prompt.parts import MAX_PARTS, Parts

MAX_CLIENT_REQUEST_ID = 256
MAX_REQUEST_ID = 1024  # a server puts its tenant and namespace before a client's


def check_prompt(prompt: object) -> None:
    """Check that it is a prompt. Raises TypeError."""
    if not isinstance(prompt, Prompt):
        raise TypeError(f"prompt must come from ModelLayout.prompt, not be a {type(prompt).__name__}")


def parts_of(parts: Sequence[Prompt]) -> Parts:
    """What a request for several prompts asks for. Raises TypeError or ValueError."""
    if isinstance(parts, Prompt) or not isinstance(parts, Sequence):
        raise TypeError(f"parts must be a sequence of prompts, not a {type(parts).__name__}")
    prompts = tuple(parts)
    if set(map(type, prompts)) - {Prompt}:
        for prompt in prompts:
            check_prompt(prompt)
    if not 1 <= len(prompts) <= MAX_PARTS:
        raise ValueError(f"a request has 1 to {MAX_PARTS} parts, not {len(prompts)}")
    first = prompts[0]
    layout, salt = first.layout, first.salt
    for prompt in prompts:
        if prompt.layout is not layout and prompt.layout != layout:
            raise ValueError("the parts of a request have one layout: these have several")
        if prompt.salt != salt:
            raise ValueError("the parts of a request have one salt: these have several")
    return Parts(prompts)


def check_request_id(request_id: str, longest: int) -> str:
    """Check that a request id is text of 1 to `longest` characters, and return it. Raises TypeError or ValueError."""
    check_text("request_id", request_id, longest, least=1)
    return request_id


def check_text(name: str, text: str, longest: int, *, least: int = 0) -> None:
    """Check that it is text of so many characters. Raises TypeError or ValueError."""
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a str, not {type(text).__name__}")
    if not least <= len(text) <= longest:
        many = f"{least} to {longest}" if least < longest else longest
        raise ValueError(f"{name} must have {many} characters, not {len(text)}")


def check_seconds(name: str, seconds: float | None) -> float | None:
    """Check for None, or a finite number that is not negative, and return it. Raises TypeError or ValueError."""
    return None if seconds is None else check_some_seconds(name, seconds)


def check_some_seconds(name: str, seconds: float) -> float:
    """Check for a finite number that is not negative, and return it. Raises TypeError or ValueError."""
    if type(seconds) not in (int, float):
        raise TypeError(f"{name} must be a number, not {type(seconds).__name__}")
    if not 0 <= seconds <= sys.float_info.max:
        raise ValueError(f"{name} must be a finite number of seconds, from 0 on, not {seconds}")
    return float(seconds)


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
    check_int("capacity", capacity)
    if not 1 <= capacity < 2**32:
        raise ValueError(f"capacity must be from 1 to 2**32 - 1, not {capacity}")
    return capacity


def start_of(prompt: Prompt | Parts, skip_tokens: int) -> int:
    """The chunk at which a prefetch begins that skips so many tokens. Raises TypeError or ValueError."""
    skipped = as_int("skip_tokens", skip_tokens)
    if skipped < 0:
        raise ValueError(f"skip_tokens must not be negative, got {skipped}")
    return min(skipped // prompt.layout.chunk_tokens, len(prompt))


def ranks_of(prompt: Prompt | Parts, ranks: Sequence[int] | None) -> tuple[int, ...]:
    """The ranks that a prefetch loads, ascending; all if None. Raises TypeError or ValueError."""
    world_size = prompt.layout.world_size
    return tuple(range(world_size)) if ranks is None else check_ranks(ranks, world_size)


class Wanted(Struct, gc=False):
    """What a prefetch asks for, checked: the chunks from `start_chunk` on, and of these the `ranks`."""

    asked: Prompt | Parts
    request_id: str | None
    start_chunk: int
    ranks: tuple[int, ...]
    deadline_seconds: float | None
    traceparent: str | None
    wait_for_writers_seconds: float | None


def wanted(
    asked: Prompt | Parts,
    *,
    longest_id: int = MAX_REQUEST_ID,
    request_id: str | None = None,
    skip_tokens: int = 0,
    ranks: Sequence[int] | None = None,
    deadline_seconds: float | None = None,
    traceparent: str | None = None,
    wait_for_writers_seconds: float | None = None,
) -> Wanted:
    """What a prefetch of a prompt, or of several, asks for. Raises TypeError or ValueError."""
    if type(asked) is not Parts:
        check_prompt(asked)
    if request_id is not None:
        check_request_id(request_id, longest_id)
    if deadline_seconds is not None:
        deadline_seconds = check_some_seconds("deadline_seconds", deadline_seconds)
    if wait_for_writers_seconds is not None:
        wait_for_writers_seconds = check_some_seconds("wait_for_writers_seconds", wait_for_writers_seconds)
    if traceparent is not None:
        check_traceparent(traceparent)
    start_chunk, here = start_of(asked, skip_tokens), ranks_of(asked, ranks)
    return Wanted(asked, request_id, start_chunk, here, deadline_seconds, traceparent, wait_for_writers_seconds)


MOST_NAME = 1024
MOST_SECONDS = 10 * 366 * 86_400.0


def check_ttl(ttl_seconds: float) -> float:
    """Check for a number of seconds from 0 to ten years, and return it. Raises TypeError or ValueError."""
    seconds = check_some_seconds("ttl_seconds", ttl_seconds)
    if seconds > MOST_SECONDS:
        raise ValueError(f"ttl_seconds must be at most {MOST_SECONDS}, ten years, not {ttl_seconds}")
    return seconds


def check_tokens(prompt: Prompt, tokens: int | None) -> None:
    """Check for None, or a number of tokens that the prompt has. Raises TypeError or ValueError."""
    if tokens is None:
        return
    check_int("tokens", tokens)
    if not 0 <= tokens <= prompt.tokens:
        raise ValueError(f"tokens must be from 0 to the {prompt.tokens} of the prompt, not {tokens}")


def check_hint(output_tokens: int | None, returns: bool | None, within_seconds: float | None) -> None:
    """Check what is told of a prompt's future. Raises TypeError or ValueError."""
    if output_tokens is not None:
        check_int("output_tokens", output_tokens)
        if not 0 <= output_tokens < 2**63:
            raise ValueError(f"output_tokens must not be negative, and less than 2**63, not {output_tokens}")
    if type(returns) not in (bool, type(None)):
        raise TypeError(f"returns must be None, True or False, not {returns!r}")
    check_seconds("within_seconds", within_seconds)


def selection_of(model: str, revision: str | None, adapter: str | None, salt: str | None) -> Selection:
    """What of a model is selected. Raises TypeError or ValueError for names that cannot be."""
    check_text("model", model, MOST_NAME, least=1)
    for name, text in (("revision", revision), ("adapter", adapter), ("salt", salt)):
        if text is not None:
            check_text(name, text, MOST_NAME)
    return Selection(model, revision, adapter, salt)


def check_tier(tier: Any) -> None:
    """Check that it is one of the two ways to clear. Raises ValueError."""
    if tier not in ("l1", "all"):
        raise ValueError(f'tier must be "l1" or "all", not {tier!r}')
