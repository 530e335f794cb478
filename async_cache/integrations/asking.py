"""How far a long run of chunks is there, asked for part by part: one is looked up while the next one is hashed."""

from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future

from async_cache.prompt.layout import Prompt

FIRST_CHUNKS, MOST_CHUNKS = 512, 8192


def parts_of(chunks: int) -> Iterable[tuple[int, int]]:
    """Where the parts of a run begin and end: a short one, which ends most that are not cached, and long ones."""
    begin, size = 0, FIRST_CHUNKS
    while begin < chunks:
        yield begin, min(begin + size, chunks)
        begin, size = begin + size, MOST_CHUNKS


def count_found(prompts: Iterable[Prompt], lookup: Callable[[Prompt], int], beside: Executor) -> int:
    """How many of the first chunks of these prompts are there, until one is missing, which ends it.

    `lookup` counts those of a prompt, in a thread of `beside`; prompts are made in this one. Raises what it raises.
    """
    found = asked = 0
    asking: Future[int] | None = None
    for prompt in prompts:
        if asking is not None:
            found += asking.result()
            if found < asked:
                return found
        asked += len(prompt)
        asking = beside.submit(lookup, prompt)
    return found + asking.result() if asking is not None else found
