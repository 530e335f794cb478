"""The client of an engine that goes on without it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from async_cache import BlockingClient, CacheClosedError, ConnectionLostError
from async_cache.integrations.optional import OptionalClient, OptionalState

from .support import until


@pytest.fixture
def make(tmp_path: Path) -> Callable[[], BlockingClient]:
    return lambda: BlockingClient(f"unix://{tmp_path}/none.sock", connect_timeout_seconds=0.05)


def depth(error: BaseException) -> int:
    trace, count = error.__traceback__, 0
    while trace is not None:
        trace, count = trace.tb_next, count + 1
    return count


def test_a_server_that_is_not_there_is_not_waited_for_again(make: Callable[[], BlockingClient]) -> None:
    made = []
    client = OptionalClient(lambda: made.append(make()) or made[-1], retry_seconds=60)
    errors = []
    for _ in range(5):
        with pytest.raises(ConnectionLostError, match="there is no server at") as raised:
            client.get()
        errors.append(raised.value)
    assert len(made) == 1
    assert depth(errors[-1]) <= 2, "the error does not grow by being raised"
    client.close()


def test_it_is_tried_again_in_the_background(make: Callable[[], BlockingClient]) -> None:
    made = []
    client = OptionalClient(lambda: made.append(make()) or made[-1], retry_seconds=1e-9)
    with pytest.raises(ConnectionLostError):
        client.get()
    until(lambda: client._state is OptionalState.ABSENT and len(made) == 2)
    client.close()


def test_after_close_there_is_none(make: Callable[[], BlockingClient]) -> None:
    client = OptionalClient(make, retry_seconds=1e-9)
    client.close()
    client.close()
    client.failed(ConnectionLostError("late"))
    with pytest.raises(CacheClosedError):
        client.get()
