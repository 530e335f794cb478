"""How the backends are made that a suite tests."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from async_cache.l2.backend import Backend
from async_cache.prompt.keys import ObjectKey
from async_cache.testing.conformance.objects import (
    MIB,
    put,
)


class Made:
    """Makes backends: a subclass says how, and may leave out all but `make`."""

    pytestmark = pytest.mark.asyncio

    async def make(self, tmp_path: Path) -> Backend:
        """An empty backend that is not opened yet; the suite opens and closes it."""
        raise NotImplementedError

    async def capacity_backend(self, tmp_path: Path, capacity_bytes: int) -> Backend:
        """The same, with a bound. What it adds to an object (a header, padding) must be less than 1/16 of a MiB."""
        pytest.skip("no bounded backend")

    async def damage(self, backend: Backend, key: ObjectKey, bit: int) -> None:
        """Flip one bit of the bytes that are stored for an object."""
        pytest.skip("no way to damage an object")

    async def make_unreadable(self, backend: Backend, key: ObjectKey) -> None:
        """Let what is stored for an object be impossible to read from now on, until it is stored anew."""
        pytest.skip("no way to make an object unreadable")

    @pytest_asyncio.fixture
    async def backend(self, tmp_path: Path) -> AsyncIterator[Backend]:
        """An open backend."""
        backend = await self.make(tmp_path)
        await backend.open()
        yield backend
        await backend.close()

    @pytest_asyncio.fixture
    async def full(self, tmp_path: Path) -> AsyncIterator[Backend]:
        """An open backend with room for the objects 0 to 3 of a MiB, which are there, and for no more."""
        backend = await self.capacity_backend(tmp_path, 4 * MIB + MIB // 2)
        await backend.open()
        assert await put(backend, range(4), MIB) == [True] * 4
        yield backend
        await backend.close()
