"""URLs of backends: what each becomes, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from async_cache.errors import ConfigError
from async_cache.l2 import registry
from async_cache.l2.filesystem.backend import FileSystemBackend
from async_cache.l2.memory import MemoryBackend
from async_cache.l2.registry import from_url


@pytest.fixture
def filesystem(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """The arguments that a URL gives the file system backend."""
    scheme = replace(registry._SCHEMES["fs"], make=lambda **arguments: arguments)
    monkeypatch.setitem(registry._SCHEMES, "fs", scheme)
    return cast("Callable[[str], dict[str, Any]]", from_url)


@pytest.mark.parametrize(
    ("url", "name", "capacity_bytes"),
    [
        ("memory://", "memory", None),
        ("memory:", "memory", None),
        ("MEMORY://near?capacity=1GiB", "near", 2**30),
        ("memory://?capacity=4096", "memory", 4096),
        ("memory://?capacity=none", "memory", None),
    ],
)
def test_memory(url: str, name: str, capacity_bytes: int | None) -> None:
    backend = from_url(url)
    assert isinstance(backend, MemoryBackend)
    assert backend.name == name
    assert backend.capacity_bytes == capacity_bytes


@pytest.mark.parametrize(
    ("url", "arguments"),
    [
        ("fs:///var/cache/kv", {"path": "/var/cache/kv"}),
        ("fs:/var/cache/kv?capacity=1MiB", {"path": "/var/cache/kv", "capacity_bytes": 2**20}),
        ("fs:///kv?capacity=none&durability=fsync", {"path": "/kv", "capacity_bytes": None, "durability": "fsync"}),
        (
            "fs:///a%20b%3F/%C3%A9?durability=none&direct=false&threads=2",
            {
                "path": "/a b?/é",
                "durability": "none",
                "direct": False,
                "threads": 2,
            },
        ),
        ("fs:///kv?direct=true", {"path": "/kv", "direct": True}),
    ],
)
def test_filesystem(filesystem: Callable[[str], dict[str, Any]], url: str, arguments: dict[str, Any]) -> None:
    assert filesystem(url) == arguments


def test_a_directory_is_bounded_to_10_gib_unless_the_url_says_otherwise(tmp_path: Path) -> None:
    bounded, unbounded = from_url(f"fs://{tmp_path}"), from_url(f"fs://{tmp_path}?capacity=none")
    assert isinstance(bounded, FileSystemBackend)
    assert bounded.usage().capacity_bytes == 10 * 2**30
    assert unbounded.usage().capacity_bytes is None


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "unknown scheme ''"),
        ("/var/cache/kv", "unknown scheme ''"),
        ("ftp://host/path", "unknown scheme 'ftp'"),
        ("memory://[", "Invalid IPv6"),
        ("memory://name/path", "no path"),
        ("memory://?size=1", "unknown parameter 'size'"),
        ("memory://?capacity", "bad query field"),
        ("memory://?capacity=", "capacity: '' is not a size"),
        ("memory://?capacity=much", "capacity: 'much' is not a size"),
        ("memory://?capacity=0", "capacity: must be more than 0"),
        ("memory://?capacity=1&capacity=1", "parameter 'capacity' is repeated"),
        ("memory://?threads=2", "unknown parameter 'threads'"),
        ("memory://#x", "fragment"),
        ("fs://host/path", "no host"),
        ("fs://relative", "no host"),
        ("fs:relative/path", "'relative/path' is not absolute"),
        ("fs://", "'' is not absolute"),
        ("fs:///kv?durability=yes", "durability: 'yes' is not none or fsync"),
        ("fs:///kv?direct=1", "direct: '1' is not true or false"),
        ("fs:///kv?threads=0", "threads: '0' is not a number"),
        ("fs:///kv?threads=2.5", "threads: '2.5' is not a number"),
        ("fs:///kv?path=/other", "unknown parameter 'path'"),
    ],
)
def test_what_can_not_be_used_is_refused_with_the_url_and_what_is_allowed(url: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_url(url)
    message = str(caught.value)
    assert message.startswith(f"{url}: ")
    assert reason in message
    assert "memory://[name]?capacity=1GiB or fs:///path?" in message


@pytest.mark.parametrize("scheme", ["redis", "fs"])
def test_a_password_is_not_shown(scheme: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_url(f"{scheme}://user:secret@host/0")
    assert "secret" not in str(caught.value)
    assert "host" in str(caught.value)
