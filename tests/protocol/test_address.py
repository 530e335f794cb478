"""Addresses: what is one and what is not, who can reach it, and where a server listens if nothing is said."""

import os
import tempfile
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_cache.errors import ConfigError
from async_cache.protocol.address import Address, default_url

LONGEST = 107  # bytes, see unix(7)


# Unix sockets.


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("unix:///run/cache.sock", "/run/cache.sock"),
        ("unix:/run/cache.sock", "/run/cache.sock"),
        ("UNIX:///run/Cache", "/run/Cache"),
        ("unix:////run//cache", "//run//cache"),
        ("unix:///a%20b%3F%23%25", "/a b?#%"),
        ("unix:///a b:1@c", "/a b:1@c"),
        ("unix:///[a]", "/[a]"),
        ("unix:///%C3%A9", "/é"),
        ("unix:///é", "/é"),
    ],
)
def test_a_path_is_percent_decoded(url: str, path: str) -> None:
    address = Address.parse(url)
    assert address == Address(path=path)
    assert address.is_local


@pytest.mark.parametrize("url", ["unix://", "unix:///", "unix:///run/", "unix://run/a", "unix:run/a", "unix://host/a"])
def test_a_path_that_is_not_absolute_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="the path of a socket is absolute"):
        Address.parse(url)


@pytest.mark.parametrize("letter", ["a", "é", "%C3%A9", "%20"])
def test_a_path_has_at_most_107_bytes(letter: str) -> None:
    size = len(Address.parse(f"unix:///{letter}").path.encode()) - 1
    count = (LONGEST - 1) // size
    rest = "b" * (LONGEST - 1 - count * size)
    assert len(Address.parse(f"unix:///{letter * count}{rest}").path.encode()) == LONGEST
    with pytest.raises(ConfigError, match="at most 107 bytes"):
        Address.parse(f"unix:///{letter * count}{rest}b")


def test_a_path_has_no_zero_byte() -> None:
    with pytest.raises(ConfigError):
        Address.parse("unix:///a%00b")


@pytest.mark.parametrize("url", ["unix:///a%FFb", "unix:///a\nb", "unix:///a\tb"])
def test_a_path_is_never_another_than_the_one_that_was_written(url: str) -> None:
    try:
        address = Address.parse(url)
    except ConfigError:
        return
    assert os.fsencode(address.path) in (b"/a\xffb", b"/a\nb", b"/a\tb")


# Hosts and ports.


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("tcp://localhost:7000", "localhost", 7000),
        ("tcp://Cache.Example:1", "cache.example", 1),
        ("tcp://127.0.0.1:0", "127.0.0.1", 0),
        ("tcp://[::1]:65535", "::1", 65535),
        ("tcp://[fe80::1%eth0]:5", "fe80::1%eth0", 5),
    ],
)
def test_a_host_and_a_port_are_taken_apart(url: str, host: str, port: int) -> None:
    address = Address.parse(url)
    assert address == Address(host=host, port=port)
    assert str(address) == url.lower()


@pytest.mark.parametrize(
    "url",
    [
        "tcp://localhost",
        "tcp://localhost:",
        "tcp://:7000",
        "tcp://",
        "tcp:///path",
        "tcp://localhost:7000/",
        "tcp://localhost:7000/path",
        "tcp://localhost:65536",
        "tcp://localhost:-1",
        "tcp://localhost:http",
        "tcp://::1:7000",
        "tcp://[::1:7000",
        "tcp://[::1]",
    ],
)
def test_what_lacks_a_host_or_a_port_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="allowed: unix:///path, tcp://host:port or tls://host:port"):
        Address.parse(url)


@pytest.mark.parametrize("host", ["a..b", "a" * 64, ".a"])
def test_a_name_that_no_host_can_have_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="allowed: unix:///path, tcp://host:port or tls://host:port"):
        Address.parse(f"tcp://{host}:7000")


@pytest.mark.parametrize(
    "url",
    [
        "unix:///a?mode=0600",
        "unix:///a#b",
        "tcp://localhost:7000?a=b",
        "tcp://localhost:7000#a",
        "tcp://token@localhost:7000",
        "tcp://user:token@localhost:7000",
        "tcp://@localhost:7000",
    ],
)
def test_nothing_but_an_address_belongs_into_the_url(url: str) -> None:
    with pytest.raises(ConfigError, match="nothing but an address belongs there"):
        Address.parse(url)


@pytest.mark.parametrize("url", ["", "/run/cache.sock", "localhost:7000", "http://localhost:80", "unix", "://"])
def test_another_scheme_is_refused_with_those_that_there_are(url: str) -> None:
    with pytest.raises(
        ConfigError, match=r"unknown scheme .*; allowed: unix:///path, tcp://host:port or tls://host:port"
    ):
        Address.parse(url)


@pytest.mark.parametrize("url", [None, 5, b"unix:///a", ["unix:///a"], Address(path="/a")], ids=repr)
def test_what_is_no_text_is_refused(url: Any) -> None:
    with pytest.raises(ConfigError, match="an address must be a URL"):
        Address.parse(url)


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost", True),
        ("LOCALHOST", True),
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("[::]", False),
        ("10.0.0.5", False),
        ("192.168.0.1", False),
        ("[fe80::1]", False),
        ("[::ffff:10.0.0.5]", False),
        ("localhost.example", False),
        ("127.0.0.1.example", False),
        ("127.1", False),  # what it resolves to is not known here
        ("0", False),
        ("cache", False),
    ],
)
def test_a_port_is_local_if_it_is_bound_to_loopback(host: str, local: bool) -> None:
    assert Address.parse(f"tcp://{host}:7000").is_local is local


# There and back.


@settings(deadline=None)
@given(
    st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), min_size=1, max_size=100)
    .map(lambda text: f"/{text}")
    .filter(lambda path: len(path.encode()) <= LONGEST and not path.endswith("/"))
)
def test_every_path_is_told_such_that_it_is_found_again(path: str) -> None:
    assert Address.parse(str(Address(path=path))) == Address(path=path)


HOSTS = st.one_of(
    st.ip_addresses().map(str),
    st.lists(st.text("abcxyz019", min_size=1, max_size=20), min_size=1, max_size=4).map(".".join),
)


@settings(deadline=None)
@given(HOSTS, st.integers(0, 65535))
def test_every_host_and_port_is_told_such_that_it_is_found_again(host: str, port: int) -> None:
    assert Address.parse(str(Address(host=host, port=port))) == Address(host=host, port=port)


@settings(deadline=None)
@given(st.one_of(st.text(), st.sampled_from(["unix://", "tcp://"]).flatmap(lambda s: st.text().map(lambda t: s + t))))
def test_whatever_is_written_is_an_address_or_a_config_error(url: str) -> None:
    try:
        address = Address.parse(url)
    except ConfigError:
        return
    assert Address.parse(str(address)) == address
    assert address.path or address.host


# The default.


def test_the_default_is_in_the_users_own_directory_for_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert default_url() == "unix:///run/user/1000/async_cache.sock"


@pytest.mark.parametrize("base", [None, "", "run/user/1000"])
def test_without_that_the_default_is_in_a_directory_of_the_users_name(
    base: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    if base is not None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", base)
    monkeypatch.setattr(tempfile, "tempdir", "/var/temporary files")
    assert default_url() == f"unix:///var/temporary%20files/async_cache-{os.getuid()}/async_cache.sock"


@pytest.mark.parametrize("base", ["/a b?#%é", "/a[b]"])
def test_the_default_is_an_address_whatever_the_directory_is_called(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", base)
    assert Address.parse(default_url()) == Address(path=f"{base}/async_cache.sock")


def test_a_directory_whose_name_is_too_long_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/" + "a" * 100)
    with pytest.raises(ConfigError, match="at most 107 bytes"):
        Address.parse(default_url())


def test_a_directory_whose_name_is_no_utf_8_is_found_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", os.fsdecode(b"/a\xff"))
    assert os.fsencode(Address.parse(default_url()).path) == b"/a\xff/async_cache.sock"
