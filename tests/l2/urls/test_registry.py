"""URLs of backends: what each becomes, and what is refused; schemes of other packages; limits in any URL."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult

import pytest
from distribution import BACKEND, install

from async_cache import AsyncCache, CacheConfig
from async_cache.config import hide_password
from async_cache.errors import ConfigError
from async_cache.l2.backend import Limits
from async_cache.l2.codec.backend import CodecBackend
from async_cache.l2.filesystem.backend import FileSystemBackend
from async_cache.l2.memory import MemoryBackend
from async_cache.l2.placement import Placement, Placing
from async_cache.l2.urls.registry import from_url, from_urls
from async_cache.l2.urls.schemes import OWN
from async_cache.l2.urls.url import BackendURL


class Recorded(FileSystemBackend):
    """The arguments that a URL gives the file system backend."""

    def __init__(self, path: Any, **arguments: Any):
        self.arguments = {"path": path} | arguments


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
        ("fs:///kv?segment_bytes=64MiB", {"path": "/kv", "segment_bytes": 64 * 2**20}),
    ],
)
def test_filesystem(url: str, arguments: dict[str, Any]) -> None:
    made = Recorded.from_url(BackendURL.parse(url))
    assert made.arguments == {"capacity_bytes": 10 * 2**30} | arguments


def test_a_directory_is_bounded_to_10_gib_unless_the_url_says_otherwise(tmp_path: Path) -> None:
    bounded, unbounded = from_url(f"fs://{tmp_path}"), from_url(f"fs://{tmp_path}?capacity=none")
    assert isinstance(bounded, FileSystemBackend)
    assert bounded.usage().capacity_bytes == 10 * 2**30
    assert unbounded.usage().capacity_bytes is None


@pytest.mark.parametrize("path", ["/kv/a", "/kv/a/", "//kv//a", "/kv/./a/."])
def test_one_directory_is_one_backend_however_its_path_is_written(path: str) -> None:
    with pytest.raises(ConfigError, match="2 backends have the same name"):
        from_urls(["fs:///kv/a", f"fs://{path}"])


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
        ("fs:///kv?capacity=1", "capacity_bytes must be at least 32768"),
        ("fs:///kv?durability=yes", "durability: 'yes' is not none or fsync"),
        ("fs:///kv?direct=1", "direct: '1' is not true or false"),
        ("fs:///kv?segment_bytes=0", "segment_bytes must be from 1 to 68719476736, not 0"),
        ("fs:///kv?segment_bytes=1TiB", "segment_bytes must be from 1"),
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
    own = OWN.get(url.partition(":")[0])
    told = f"; allowed: {own.form}" if own is not None else "; there are memory, fs, valkey"
    assert message.endswith(told) if own is not None else told in message


@pytest.mark.parametrize("scheme", ["nosuch", "fs"])
def test_a_password_is_not_shown(scheme: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_url(f"{scheme}://user:secret@host/0")
    assert "secret" not in str(caught.value)
    assert "host" in str(caught.value)


def test_memory_has_no_password_that_would_be_its_name() -> None:
    with pytest.raises(ConfigError, match="no user and no password, only a name"):
        from_url("memory://user:secret@name")


# The URL, as it is given to what makes a backend.


def test_a_url_is_a_split_result_that_hides_its_password() -> None:
    url = BackendURL.parse("redis://user:secret@host:6379/0?ttl=5")
    assert isinstance(url, SplitResult)
    assert (url.scheme, url.hostname, url.port, url.password) == ("redis", "host", 6379, "secret")
    assert url.geturl() == "redis://user:secret@host:6379/0?ttl=5"
    assert repr(url) == str(url) == "BackendURL('redis://***@host:6379/0?ttl=5')"


def test_parameters_are_decoded_and_parsed_and_what_is_not_given_is_left_out() -> None:
    url = BackendURL.parse("x://host?name=a%20%26+b&empty=&count=7")
    assert url.parameters(name=str, count=int, empty=str, other=int) == {"name": "a & b", "empty": "", "count": 7}
    assert BackendURL.parse("x://host").parameters(name=str) == {}


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("x://?b=1", "unknown parameter 'b'"),
        ("x://?a=1&a=2", "parameter 'a' is repeated"),
        ("x://?a=one", "a: invalid literal"),
        ("x://?a", "bad query field: 'a'"),
        ("x://?a=1&", "bad query field: ''"),
        ("x://?a=1#b", "a fragment"),
    ],
)
def test_parameters_that_can_not_be_used_are_refused(url: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        BackendURL.parse(url).parameters(a=int)


# Limits.

ALL_LIMITS = "lookup_timeout=0.5&load_timeout=60&store_timeout=90&breaker_failures=7&breaker_reset=1.5"


@pytest.mark.parametrize("query", [ALL_LIMITS, f"capacity=65536&{ALL_LIMITS}", f"{ALL_LIMITS}&capacity=65536"])
def test_any_url_may_have_limits(query: str, tmp_path: Path) -> None:
    for url in (f"memory://?{query}", f"fs://{tmp_path}?{query}"):
        assert from_url(url).limits == Limits(
            lookup_timeout_seconds=0.5,
            load_timeout_seconds=60,
            store_timeout_seconds=90,
            breaker_failures=7,
            breaker_reset_seconds=1.5,
        )
        assert from_url(url).usage().capacity_bytes in (65536, None if "memory" in url else 10 * 2**30)


def test_a_url_without_limits_leaves_them_to_the_settings() -> None:
    assert from_url("memory://").limits == Limits()
    assert from_url("memory://?load_timeout=5").limits == Limits(load_timeout_seconds=5)


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("lookup_timeout=0", "lookup_timeout_seconds must be more than 0"),
        ("load_timeout=-1", "load_timeout_seconds must be more than 0"),
        ("store_timeout=inf", "store_timeout_seconds must be more than 0 and at most 1e9"),
        ("breaker_failures=2.5", "breaker_failures must be a whole number"),
        ("breaker_reset=", "breaker_reset_seconds must be a number, not ''"),
        ("breaker_reset", "bad query field"),
        ("lookup_timeout=1&lookup_timeout=2", "'lookup_timeout' is repeated"),
        ("%6Cookup_timeout=much", "lookup_timeout: "),
        ("lookup_timeout_seconds=1", "unknown parameter 'lookup_timeout_seconds'"),
    ],
)
def test_limits_that_can_not_be_used_are_refused(query: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_url(f"memory://?{query}")
    assert str(caught.value).startswith(f"memory://?{query}: ")
    assert reason in str(caught.value)


def test_any_url_may_say_what_the_backend_is_given(tmp_path: Path) -> None:
    for url in ("memory://near?capacity=1KiB&", f"fs://{tmp_path}/x?", "memory://?lookup_timeout=2&"):
        backend = from_url(f"{url}write=skip_if_present&promote=true&%61dmit=3")
        assert backend.placement == Placement(write=Placing.SKIP_IF_PRESENT, promote=True, admit=3)
    assert backend.limits == Limits(lookup_timeout_seconds=2)
    assert from_url("memory://").placement == Placement() == Placement(write=Placing.ALL, promote=False, admit=1)
    for placing in Placing:
        assert from_url(f"memory://?write={placing}").placement == Placement(write=placing)


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("write=", "write: '' is not all or first or skip_if_present or none"),
        ("write=ALL", "write: 'ALL' is not all"),
        ("promote=1", "promote: '1' is not true or false"),
        ("admit=0", "admit: '0' is not a number from 1 to 15"),
        ("admit=16", "admit: '16' is not a number from 1 to 15"),
        ("admit=two", "admit: 'two' is not a number"),
        ("write=all&write=all", "'write' is repeated"),
    ],
)
def test_a_placement_that_can_not_be_is_refused(query: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        from_url(f"memory://?{query}")


def test_a_placement_of_a_ready_made_backend_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="admit must be from 1 to 15, not 0"):
        Placement(admit=0)


@pytest.mark.parametrize("value", [0, -1.0, True, "1", float("inf")], ids=repr)
def test_limits_of_a_ready_made_backend_are_checked_too(value: Any) -> None:
    for name in Limits.__struct_fields__:
        with pytest.raises(ConfigError, match=f"^{name} must be"):
            Limits(**{name: value})


# Codecs.


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("codec=zstd", "zstd"),
        ("codec=zstd:19", "zstd"),
        ("codec=aes&key_file={keys}", "aes"),
        ("capacity=65536&codec=zstd,aes&lookup_timeout=5&key_file={keys}", "zstd,aes"),
        ("codec=zstd%3A3%2Caes&key_file={keys}", "zstd,aes"),
    ],
)
def test_any_url_may_have_a_codec(query: str, name: str, tmp_path: Path, packages: Callable[..., None]) -> None:
    packages(
        "kv_remote", "from async_cache.l2.memory import MemoryBackend as M\nmake = M.from_url", remote="kv_remote:make"
    )
    keys = tmp_path / "keys"
    keys.write_text("5" * 64)
    keys.chmod(0o600)
    for url in ("memory://", f"fs://{tmp_path}/kv", "remote://host"):
        backend = from_url(f"{url}?{query.format(keys=keys)}")
        assert isinstance(backend, CodecBackend)
        assert backend.codec.name == name
        assert backend.name == from_url(url).name
        if "capacity" in query:
            assert backend.usage().capacity_bytes == 65536
            assert backend.limits.lookup_timeout_seconds == 5


@pytest.mark.parametrize("query", ["", "?codec=none"])
def test_without_a_codec_objects_are_stored_as_they_are(query: str) -> None:
    assert type(from_url(f"memory://{query}")) is MemoryBackend


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("codec=lz4", "codec: 'lz4' is not none, zstd, zstd:1 to zstd:19, aes, or zstd and aes with a comma between"),
        ("codec=", "codec: '' is not none"),
        ("codec=zstd:0", "codec: 'zstd:0' is not none"),
        ("codec=zstd:20", "codec: 'zstd:20' is not none"),
        ("codec=zstd:", "codec: 'zstd:' is not none"),
        ("codec=aes,zstd", "codec: 'aes,zstd' is not none"),
        ("codec=zstd,zstd", "codec: 'zstd,zstd' is not none"),
        ("codec=zstd,", "codec: 'zstd,' is not none"),
        ("codec=none,aes", "codec: 'none,aes' is not none"),
        (
            "codec=fp8",
            "codec: fp8 loses bits, so it is no way to store a layout, but a layout: docs/backends/codecs.md",
        ),
        ("codec=zstd&codec=zstd", "parameter 'codec' is repeated"),
        ("codec=aes", "codec: aes needs key_file=/path"),
        ("codec=zstd&key_file=/keys", "key_file: without aes in the codec, a key has no use"),
        ("key_file=/keys", "key_file: without aes in the codec, a key has no use"),
        ("codec=aes&key_file=keys", "key_file: the path 'keys' is not absolute"),
        ("codec=aes&key_file=/no/keys", "key_file: '/no/keys' cannot be read: No such file or directory"),
    ],
)
def test_codecs_that_can_not_be_used_are_refused(query: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_url(f"memory://?{query}")
    assert str(caught.value).startswith(f"memory://?{query}: {reason}")


def test_a_codec_needs_a_backend_that_loads_what_it_does_not_know_the_size_of(packages: Callable[..., None]) -> None:
    source = """
from async_cache.l2 import Backend
from async_cache.l2.memory import MemoryBackend
class Old(MemoryBackend):
    load_sized = Backend.load_sized
def make(url):
    return Old(url.netloc)
"""
    packages("kv_old", source, old="kv_old:make")
    with pytest.raises(ConfigError, match=r"^old://host\?codec=zstd: codec: Old loads only .*no load_sized"):
        from_url("old://host?codec=zstd")


@pytest.mark.parametrize(("codec", "missing"), [("zstd", "numpy"), ("zstd", "backports"), ("aes", "cryptography")])
def test_what_a_codec_needs_is_told_where_it_is_not_installed(codec: str, missing: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("5" * 64)
    keys.chmod(0o600)
    url = f"memory://?codec={codec}{f'&key_file={keys}' if codec == 'aes' else ''}"
    code = f"""
import sys
sys.modules[{missing!r}] = None
import async_cache
from async_cache.l2.urls.registry import from_url, from_urls
from_url("memory://")
try:
    from_url({url!r})
except async_cache.ConfigError as error:
    print(error)
"""
    told = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert "pip install 'async-kv-cache[codecs]'" in told and missing in told and told.count("\n") == 1


# Schemes of other packages.


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs distributions for one test."""
    monkeypatch.syspath_prepend(tmp_path)

    def install_here(name: str, source: str | None = BACKEND, **schemes: str) -> None:
        monkeypatch.delitem(sys.modules, name, raising=False)
        install(tmp_path, name, source, **schemes)

    return install_here


async def test_a_cache_uses_the_scheme_of_another_package(packages: Callable[..., None]) -> None:
    packages("kv_remote", remote="kv_remote:make", other="kv_remote:nothing")
    config = CacheConfig(l1_bytes=4096, l2=["remote://user:pw@host:7/0?lookup_timeout=5&capacity_bytes=64"])
    async with AsyncCache(config) as cache:
        (usage,) = (await cache.stats()).backends.items()
        assert usage[0] == "remote host:7/0"
        assert usage[1].capacity_bytes == 64
        assert cache.core.guards.current[0].timeouts.lookup_seconds == 5
        assert cache.core.guards.current[0].timeouts.load_seconds == 30


def test_limits_of_a_url_come_before_those_of_the_package(packages: Callable[..., None]) -> None:
    source = """
from async_cache.l2 import Limits
from async_cache.l2.memory import MemoryBackend
class Slow(MemoryBackend):
    limits = Limits(lookup_timeout_seconds=5, load_timeout_seconds=100)
def make(url):
    assert "timeout" not in url.query, url
    return Slow(url.query)
"""
    packages("kv_slow", source, slow="kv_slow:make")
    made = from_url("slow://host?a=%20&lookup_timeout=2&b=c")
    assert made.limits == Limits(lookup_timeout_seconds=2, load_timeout_seconds=100)
    assert made.name == "a=%20&b=c"
    assert (
        from_url("slow://host").limits
        == type(made).limits
        == Limits(lookup_timeout_seconds=5, load_timeout_seconds=100)
    )


def test_our_own_schemes_are_not_those_of_another_package(packages: Callable[..., None]) -> None:
    packages("kv_taker", memory="kv_taker:make", fs="kv_taker:make")
    assert type(from_url("memory://near")) is MemoryBackend


def test_an_unknown_scheme_is_told_with_those_of_packages(packages: Callable[..., None]) -> None:
    packages("kv_remote", remote="kv_remote:make", remotes="kv_remote:make")
    with pytest.raises(
        ConfigError, match=r"unknown scheme 'rmote'; there are memory, .*; of installed packages: remote, remotes$"
    ):
        from_url("rmote://host")


@pytest.mark.parametrize(
    ("source", "value", "reason"),
    [
        (BACKEND, "kv_bad:absent", "kv_bad:absent of kv_bad 1.5 cannot be imported: AttributeError"),
        (BACKEND, "kv_absent:make", "kv_absent:make of kv_bad 1.5 cannot be imported: ModuleNotFoundError"),
        ("raise OSError('no library')", "kv_bad:make", "kv_bad 1.5 cannot be imported: OSError: no library"),
        ("make =", "kv_bad:make", "kv_bad 1.5 cannot be imported: SyntaxError"),
        ("make = 5", "kv_bad:make", "kv_bad 1.5 failed: TypeError: 'int' object is not callable"),
        ("def make(url): raise KeyError(url.geturl())", "kv_bad:make", "kv_bad 1.5 failed: KeyError: 'bad://user:***@"),
        ("def make(url): return url.port", "kv_bad:make", "kv_bad 1.5 failed: ValueError: Port"),
        ("def make(url): return url.parameters()", "kv_bad:make", "kv_bad 1.5 failed: unknown parameter 'a'"),
        ("def make(url): return None", "kv_bad:make", "kv_bad:make of kv_bad 1.5 made no Backend, but NoneType"),
        (
            BACKEND + "class Nameless(MemoryBackend):\n    def __init__(self, url): pass\n",
            "kv_bad:Nameless",
            "made a Backend without a name",
        ),
    ],
)
def test_what_is_wrong_with_a_package_is_told_with_the_url_and_the_package(
    source: str, value: str, reason: str, packages: Callable[..., None]
) -> None:
    packages("kv_bad", source, bad=value)
    with pytest.raises(ConfigError) as caught:
        from_url("bad://user:se%63ret@host:port/0?a=1")
    message = str(caught.value)
    assert message.startswith("bad://***@host:port/0?a=1: ")
    assert reason in message
    assert "secret" not in message
    assert "se%63ret" not in message


def test_a_scheme_of_two_packages_is_refused(packages: Callable[..., None]) -> None:
    packages("kv_one", shared="kv_one:make")
    packages("kv_two", shared="kv_two:make")
    with pytest.raises(ConfigError) as caught:
        from_url("shared://host")
    assert str(caught.value) == (
        "shared://host: kv_one:make of kv_one 1.5 and kv_two:make of kv_two 1.5 both give the scheme 'shared'"
    )


@pytest.mark.parametrize(
    "url",
    ["valkey://u:{}/@h/0", "valkey://u:a/{}@h", "valkey://u:{}?@h", "valkey://u:a#{}@h", "valkey:/u:{}@h", "u:{}@h"],
)
def test_a_password_that_is_written_wrongly_is_told_to_nobody(url: str) -> None:
    with pytest.raises(ConfigError) as raised:
        from_url(url.format("hunter2"))
    assert "hunter2" not in str(raised.value)
    assert "hunter2" not in repr(CacheConfig(l2=[url.format("hunter2"), "fs:///mnt/a@b/c?policy=x@y"]))


def test_what_is_no_password_is_shown() -> None:
    for url in ("fs:///mnt/a@b/c", "valkey://h:6379/0", "s3://b/a@b?endpoint=http://h:9000", "valkey://[::1]:1/a"):
        assert hide_password(f"l2: {url}: it failed at 12:30") == f"l2: {url}: it failed at 12:30"
