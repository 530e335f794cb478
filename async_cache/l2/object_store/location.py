"""What a URL says of a bucket, and the clients of obstore that are made from it.

    s3://bucket[/prefix]?endpoint=https://host:9000&region=eu-central-1
    gs://bucket[/prefix]
    az://container[/prefix]?account=name

Credentials are never in a URL: each service's client finds them where its users have them, in the environment, in the
files that the environment names, or with the service that the machine's provider runs for them.
"""

import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, unquote, urlsplit

from msgspec import Struct
from obstore.store import AzureStore, GCSStore, ObjectStore, S3Store

from async_cache.config import parse_bytes
from async_cache.errors import ConfigError
from async_cache.l2.urls.url import BackendURL, one_of, whole_number

CONCURRENCY = 32
PART_BYTES = 8 * 2**20
SMALLEST_PART_BYTES = 5 * 2**20  # of an upload to S3, but for the last one
RETRIES = 2

_BUCKET = re.compile("[A-Za-z0-9][A-Za-z0-9._-]{1,221}")
_PREFIX = re.compile(r"[A-Za-z0-9_=+@-][A-Za-z0-9._=+@-]*(/[A-Za-z0-9_=+@-][A-Za-z0-9._=+@-]*)*")

_boolean = one_of(true=True, false=False)


class _Service(Struct, frozen=True):
    """A kind of object store: its client, and what the parameters of a URL are called there."""

    store: Callable[..., ObjectStore]
    endpoint: str
    own: dict[str, tuple[Callable[[str], Any], str]]


_SERVICES = {
    "s3": _Service(
        S3Store,
        "endpoint",
        {
            "region": (str, "region"),
            "addressing": (one_of(path=False, virtual=True), "virtual_hosted_style_request"),
            "bulk_delete": (one_of(true=False, false=True), "disable_bulk_delete"),
        },
    ),
    "gs": _Service(GCSStore, "base_url", {}),
    "az": _Service(AzureStore, "endpoint", {"account": (str, "account_name")}),
}


class Location(Struct, frozen=True):
    """A bucket and a prefix in it, how they are reached, and how much is asked of them at a time."""

    scheme: str
    bucket: str
    prefix: str
    endpoint: str | None
    options: dict[str, Any]
    client_options: dict[str, Any]
    concurrency: int
    part_bytes: int

    @classmethod
    def of(cls, url: BackendURL) -> Self:
        """What a URL says. Raises ConfigError, also where the client cannot be made from it."""
        service = _SERVICES[url.scheme]
        parameters = url.parameters(
            endpoint=_endpoint,
            allow_http=_boolean,
            ca=_certificates,
            anonymous=_boolean,
            concurrency=whole_number(most=1024),
            part=_part,
            **{name: parser for name, (parser, _) in service.own.items()},
        )
        if url.username is not None:
            raise ConfigError("credentials come from the environment, not from the URL")
        endpoint, allow_http = parameters.get("endpoint"), parameters.get("allow_http", False)
        if endpoint is not None and endpoint.startswith("http:") and not allow_http:
            raise ConfigError(f"the endpoint {endpoint} is not encrypted, which needs allow_http=true")
        options = {option: parameters[name] for name, (_, option) in service.own.items() if name in parameters}
        if endpoint is not None:
            options[service.endpoint] = endpoint
        if parameters.get("anonymous", False):
            options["skip_signature"] = True
        if url.scheme == "s3" and not (endpoint or "").startswith("http:"):
            options["unsigned_payload"] = True  # TLS protects it, and a record has a checksum of its own
        client_options: dict[str, Any] = {"allow_http": allow_http}
        if "ca" in parameters:
            client_options["root_certificate"] = parameters["ca"]
        made = cls(
            url.scheme,
            _bucket(url.netloc),
            _prefix(url.path),
            endpoint,
            options,
            client_options,
            parameters.get("concurrency", CONCURRENCY),
            parameters.get("part", PART_BYTES),
        )
        made.connect(1.0)
        return made

    @property
    def name(self) -> str:
        """The URL without what does not tell one place from another."""
        prefix = f"/{self.prefix}" if self.prefix else ""
        endpoint = f"?endpoint={quote(self.endpoint, safe=':/')}" if self.endpoint is not None else ""
        return f"{self.scheme}://{self.bucket}{prefix}{endpoint}"

    def connect(self, seconds: float) -> ObjectStore:
        """A client, without a connection yet, each of whose calls of one request ends within so many seconds.

        That is half of the time for a request, and half for what is tried before the last one. Raises ConfigError.
        """
        half = f"{max(1, round(seconds * 500))}ms"
        retry = {
            "max_retries": RETRIES,
            "retry_timeout": timedelta(seconds=seconds / 2),
            "backoff": {
                "init_backoff": timedelta(seconds=min(0.1, seconds / 20)),
                "max_backoff": timedelta(seconds=seconds / 4),
                "base": 2,
            },
        }
        client = {**self.client_options, "timeout": half, "connect_timeout": half}
        try:
            return _SERVICES[self.scheme].store(self.bucket, client_options=client, retry_config=retry, **self.options)
        except Exception as error:  # of any class: it is the settings that are wrong, or the environment
            raise ConfigError(str(error).partition("\n")[0]) from None


def _bucket(text: str) -> str:
    if not _BUCKET.fullmatch(text):
        raise ConfigError(f"{text!r} is not the name of a bucket")
    return text


def _prefix(path: str) -> str:
    prefix = unquote(path).strip("/")
    if prefix and not _PREFIX.fullmatch(prefix):
        raise ConfigError(f"the prefix {prefix!r} may have letters, digits and ._=+@- between single slashes")
    return prefix


def _endpoint(text: str) -> str:
    parts = urlsplit(text)
    parts.port  # noqa: B018 (raises ValueError for one that is none)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError("must be http://host[:port] or https://host[:port]")
    if parts.username is not None:
        raise ConfigError("credentials come from the environment, not from the URL")
    return text.rstrip("/")


def _certificates(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path!r} cannot be read: {error.strerror}") from error


def _part(text: str) -> int:
    size_bytes = parse_bytes(text)
    if not SMALLEST_PART_BYTES <= size_bytes <= 2**30:
        raise ConfigError(f"{text!r} is not a size from 5MiB to 1GiB")
    return size_bytes
