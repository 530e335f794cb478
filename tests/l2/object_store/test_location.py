"""What a URL of a bucket says, and what is refused."""

import subprocess
import sys
from pathlib import Path

import pytest

from async_cache.config import CacheConfig
from async_cache.errors import ConfigError
from async_cache.l2.object_store.location import Location
from async_cache.l2.urls.registry import from_url
from async_cache.l2.urls.url import BackendURL

from .support import CREDENTIALS


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/kv/prod/?region=eu-central-1&concurrency=64", "s3://bucket/kv/prod"),
        (
            "s3://bucket/kv?endpoint=https://ID.r2.cloudflarestorage.com/&region=auto",
            "s3://bucket/kv?endpoint=https://ID.r2.cloudflarestorage.com",
        ),
        ("s3://b1?endpoint=http://minio:9000&allow_http=true", "s3://b1?endpoint=http://minio:9000"),
        ("gs://bucket/kv?anonymous=true", "gs://bucket/kv"),
        ("az://container/kv?account=storage", "az://container/kv"),
    ],
)
def test_a_url_names_a_place(url: str, name: str) -> None:
    assert from_url(url).name == name
    assert from_url(url).shared


def test_parameters_reach_the_client() -> None:
    url = "s3://bucket/kv?region=auto&addressing=virtual&bulk_delete=false&anonymous=true&concurrency=7&part=16MiB"
    location = Location.of(BackendURL.parse(url))
    assert (location.prefix, location.concurrency, location.part_bytes) == ("kv", 7, 16 * 2**20)
    config = location.connect(3).config
    assert config["region"] == "auto"
    assert {name: str(config[name]).lower() for name in location.options} == {
        "region": "auto",
        "virtual_hosted_style_request": "true",
        "disable_bulk_delete": "true",
        "skip_signature": "true",
        "unsigned_payload": "true",
    }


@pytest.mark.parametrize("seconds", [0.05, 1.0, 30.0])
def test_what_a_client_tries_ends_within_the_time_of_the_call(seconds: float) -> None:
    store = Location.of(BackendURL.parse("s3://bucket?anonymous=true")).connect(seconds)
    assert store.retry_config is not None and store.client_options is not None
    longest = store.retry_config["retry_timeout"].total_seconds() + seconds / 2
    assert str(store.client_options["timeout"]) in (f"{round(seconds * 500)}ms", str(seconds / 2))
    assert longest <= seconds


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3://", "'' is not the name of a bucket"),
        ("s3:///bucket", "'' is not the name of a bucket"),
        ("s3://-bucket", "not the name of a bucket"),
        ("s3://bucket:9000", "not the name of a bucket"),
        ("s3://bucket/a//b", "the prefix 'a//b' may have"),
        ("s3://bucket/../b", "the prefix '../b' may have"),
        ("s3://bucket/a%20b", "the prefix 'a b' may have"),
        ("s3://bucket?capacity=1GiB", "unknown parameter 'capacity'"),
        ("s3://bucket?account=x", "unknown parameter 'account'"),
        ("s3://bucket?endpoint=minio:9000", "endpoint: must be http://host"),
        ("s3://bucket?endpoint=http://minio:9000", "is not encrypted, which needs allow_http=true"),
        ("s3://bucket?endpoint=https://minio:port", "endpoint: Port could not be cast"),
        ("s3://bucket?concurrency=0", "concurrency: '0' is not a number from 1 to 1024"),
        ("s3://bucket?part=1MiB", "part: '1MiB' is not a size from 5MiB to 1GiB"),
        ("s3://bucket?addressing=other", "addressing: 'other' is not path or virtual"),
        ("s3://bucket?ca=/not/there", "ca: '/not/there' cannot be read: No such file"),
        ("az://container", "Account must be specified"),
        ("s3://bucket#x", "a fragment"),
    ],
)
def test_what_can_not_be_used_is_refused_in_one_line(url: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(ConfigError) as caught:
        from_url(url)
    assert reason in str(caught.value)
    assert str(caught.value).startswith(f"{url}: ") and "\n" not in str(caught.value)


def test_certificates_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    with pytest.raises(ConfigError, match="No certificates found"):
        from_url(f"s3://bucket?ca={tmp_path}/ca.pem")


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKID:SECRET@bucket/kv",
        "s3://bucket?endpoint=https://AKID:SECRET@minio:9000",
        "s3://bucket?secret_access_key=SECRET",
        "az://container?account=storage&sas_token=SECRET",
        "az://container?account=storage&account_key=SECRET&part=1",
    ],
)
def test_credentials_of_a_url_are_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_url(url)
    assert "SECRET" not in str(caught.value)
    assert "SECRET" not in repr(BackendURL.parse(url))


def test_nothing_shows_the_credentials() -> None:
    backend = from_url("s3://bucket/kv?region=us-east-1")
    shown = f"{backend!r} {backend.name} {CacheConfig(l2=('s3://bucket/kv',))!r}"
    assert not any(secret in shown for secret in CREDENTIALS.values())


def test_without_the_extra_the_error_names_it() -> None:
    code = """
import sys
sys.modules["obstore"] = None
from async_cache import AsyncCache
from async_cache.l2.urls.registry import from_url
from async_cache.errors import ConfigError
try:
    from_url("s3://bucket")
except ConfigError as error:
    print(error)
"""
    said = subprocess.check_output((sys.executable, "-c", code), text=True)
    assert "it needs the extra objects: pip install 'async-kv-cache[objects]'" in said
