"""URLs of servers and clusters: what each becomes, what is refused, and that no password is told."""

import ssl
from pathlib import Path
from typing import Any

import pytest

from async_cache.errors import ConfigError
from async_cache.l2.urls.registry import from_url, from_urls
from async_cache.l2.urls.schemes import OWN
from async_cache.l2.urls.url import BackendURL
from async_cache.l2.valkey.settings import Address, Settings

from .certificates import Certificates


def settings(url: str) -> Settings:
    return Settings.from_url(BackendURL.parse(url))


@pytest.mark.parametrize(
    ("url", "name", "expected"),
    [
        ("valkey://host", "valkey://host:6379", {"addresses": (Address("host", 6379),), "tls": None}),
        ("redis://host:7000/3", "redis://host:7000/3", {"addresses": (Address("host", 7000),), "database": 3}),
        ("redis://[::1]:7000", "redis://[::1]:7000", {"addresses": (Address("::1", 7000),)}),
        ("redis://u%40x:p%3A%2F@h/0", "redis://h:6379", {"username": "u@x", "password": "p:/"}),
        ("redis://:p@h", "redis://h:6379", {"username": None, "password": "p"}),
        ("valkey://h?namespace=a.b:c/d_e-f", "valkey://h:6379?namespace=a.b:c/d_e-f", {"namespace": "a.b:c/d_e-f"}),
        ("valkey://h?ttl=1.5&connections=7", "valkey://h:6379", {"ttl_seconds": 1.5, "connections": 7}),
        ("valkey://h?connect_timeout=3&usage_every=60", "valkey://h:6379", {"connect_timeout_seconds": 3.0}),
        ("valkey://h?password_file=/p", "valkey://h:6379", {"password_file": Path("/p"), "password": None}),
        ("valkey+unix:///run/a%20b", "valkey+unix:///run/a b", {"addresses": (Address("/run/a b", 0),)}),
        ("valkey+unix:///run/%FF", "valkey+unix:///run/\\xff", {"addresses": (Address("/run/\udcff", 0),)}),
        ("valkey://h?password_file=/p%FF", "valkey://h:6379", {"password_file": Path("/p\udcff")}),
        ("redis+unix://u:p@/run/s?db=2", "redis+unix:///run/s?db=2", {"database": 2, "username": "u"}),
        (
            "valkey+cluster://a:1,b",
            "valkey+cluster://a:1,b:6379",
            {"addresses": (Address("a", 1), Address("b", 6379)), "is_cluster": True},
        ),
    ],
)
def test_what_a_url_stands_for(url: str, name: str, expected: dict[str, Any]) -> None:
    made = settings(url)
    assert made.name == name
    assert {field: getattr(made, field) for field in expected} == expected


@pytest.mark.parametrize("scheme", ["valkeys", "rediss", "valkeys+cluster", "rediss+cluster"])
def test_tls_verifies_unless_it_is_told_otherwise(scheme: str, tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    full, ca, none = (
        settings(f"{scheme}://h?{certificates.parameters}&verify={how}").tls for how in ("full", "ca", "none")
    )
    plain = settings(f"{scheme}://h").tls
    assert plain and full and ca and none
    assert [tls.check_hostname for tls in (plain, full, ca, none)] == [True, True, False, False]
    assert [tls.verify_mode for tls in (plain, full, ca, none)] == [ssl.CERT_REQUIRED] * 3 + [ssl.CERT_NONE]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("valkey://", "'' is not host or host:port"),
        ("valkey://h:0", "'h:0' is not host or host:port"),
        ("valkey://h:99999", "is not host or host:port"),
        ("valkey://h:x", "is not host or host:port"),
        ("valkey://a,b", "only a cluster has several addresses"),
        ("valkey+cluster://a,a", "an address is repeated"),
        ("valkey+cluster://a/1", "a cluster has no databases"),
        ("valkey://h/x", "'x' is not the number of a database"),
        ("valkey://h/-1", "'-1' is not the number of a database"),
        ("valkey://h?db=1", "unknown parameter 'db'"),
        ("valkey://h?ca=/x", "unknown parameter 'ca'"),
        ("valkeys://h?ca=x", "the path 'x' is not absolute"),
        ("valkeys://h?ca=/nowhere", "the certificates cannot be used"),
        ("valkeys://h?cert=/nowhere", "cert and key belong together"),
        ("valkeys://h?verify=no", "verify: 'no' is not full or ca or none"),
        ("valkey://h?namespace=", "is not 1 to 64 of the characters"),
        ("valkey://h?namespace=a{b}", "is not 1 to 64 of the characters"),
        ("valkey://h?namespace=a*", "is not 1 to 64 of the characters"),
        ("valkey://h?ttl=0", "ttl: "),
        ("valkey://h?ttl=soon", "ttl: "),
        ("valkey://h?connections=0", "connections: '0' is not a number from 1 to 64"),
        ("valkey://:p@h?password_file=/p", "there are two passwords"),
        ("valkey+unix://h/run/s", "the path of a Unix socket is absolute"),
        ("valkey+unix:run/s", "the path of a Unix socket is absolute"),
        ("valkey+unix:///" + 36 * "%FFab", "has at most 107 bytes"),
        ("valkey://h?namespace=%FF", "namespace: "),
        ("valkey://h#x", "fragment"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line_with_what_is_allowed(url: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_url(url)
    message = str(caught.value)
    assert reason in message and "\n" not in message
    assert OWN[url.partition(":")[0]].form in message


@pytest.mark.parametrize("more", ["", "?connections=0", "/x", "?nothing=1"])
def test_a_password_is_in_no_name_and_no_error(more: str) -> None:
    try:
        backend = from_url(f"valkey://me:s3cret@host{more}")
        told = f"{backend!r} {backend.name} {vars(backend)}"
    except ConfigError as error:
        told = f"{error!r}"
    assert "s3cret" not in told and "me:" not in told


def test_two_namespaces_of_one_server_are_two_backends_and_two_urls_of_one_are_not() -> None:
    assert len(from_urls(["valkey://h", "valkey://h?namespace=x", "valkey://h/1"])) == 3
    with pytest.raises(ConfigError, match="same name"):
        from_urls(["valkey://h", "valkey://u:p@h:6379/0?ttl=5"])
