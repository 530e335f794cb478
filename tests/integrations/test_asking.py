"""Long runs of chunks, asked for part by part."""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import pytest

from async_cache import ModelLayout, ObjectGroup, Prompt
from async_cache.integrations.asking import FIRST_CHUNKS, MOST_CHUNKS, count_found, parts_of

LAYOUT = ModelLayout("toy", (ObjectGroup((4,), "uint8"),), chunk_tokens=1)


class Later(Executor):
    """A thread that does nothing before it is waited for."""

    def submit(self, call: Callable[..., int], /, *args: Prompt) -> "Future[int]":  # type: ignore[override]
        future: Future[int] = Future()
        future.result = lambda timeout=None: call(*args)  # type: ignore[method-assign]
        return future


@pytest.mark.parametrize("chunks", [0, 1, FIRST_CHUNKS, FIRST_CHUNKS + 1, 20_000])
def test_parts_cover_a_run_in_order(chunks: int) -> None:
    parts = list(parts_of(chunks))
    assert [n for begin, end in parts for n in (begin, end)] == sorted([n for part in parts for n in part])
    assert sum(end - begin for begin, end in parts) == chunks
    assert all(end - begin <= MOST_CHUNKS for begin, end in parts)


@pytest.mark.parametrize("there", range(13))
@pytest.mark.parametrize("executor", [Later, lambda: ThreadPoolExecutor(1)])
def test_the_first_chunk_that_is_missing_ends_it(there: int, executor: Callable[[], Executor]) -> None:
    asked: list[int] = []
    made: list[int] = []

    def prompts() -> Iterator[Prompt]:
        for begin in range(0, 12, 3):
            made.append(begin)
            yield LAYOUT.prompt(range(begin, begin + 3))

    def lookup(prompt: Prompt) -> int:
        begin = 3 * len(asked)
        asked.append(begin)
        return min(3, max(0, there - begin))

    with executor() as beside:
        assert count_found(prompts(), lookup, beside) == there
    assert len(asked) == min(4, there // 3 + 1)
    assert len(made) <= len(asked) + 1, "no more is hashed than one part ahead"


def test_what_a_lookup_raises_is_raised() -> None:
    def lookup(prompt: Prompt) -> int:
        raise ConnectionError("gone")

    with ThreadPoolExecutor(1) as beside, pytest.raises(ConnectionError, match="gone"):
        count_found([LAYOUT.prompt([1])] * 3, lookup, beside)
