"""The settings, built once at the edge: from arguments, or from a TOML file and the environment."""

import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Self, get_args
from urllib.parse import quote

import msgspec
from msgspec import Meta, Struct, field

from async_cache.errors import BackendError, ConfigError
from async_cache.prompt.keys import check_label
from async_cache.prompt.objects import PAGE_BYTES
from async_cache.protocol.address import Address, default_url
from async_cache.retention.policies import NAMES

ENVIRONMENT_PREFIX = "ASYNC_CACHE_"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str) -> int:
    """`"10GiB"`, `"512 MB"` or `"4096"` as a number of bytes."""
    match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f"{text!r} is not a size: write a number and B, KiB, MiB, GiB, TiB, KB, MB, GB or TB")
    unit = _UNITS[match[2].upper()]
    return int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


def default_l2() -> tuple[str, ...]:
    """A directory under the user's cache directory, bounded to 10 GiB."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not base.startswith("/"):  # the XDG specification has relative paths ignored
        try:
            base = str(Path.home() / ".cache")
        except RuntimeError as error:
            raise ConfigError("there is no home directory to keep the cache in: set l2") from error
        if not base.startswith("/"):
            raise ConfigError(f"the home directory {os.path.dirname(base)!r} is not absolute: set l2")
    return (f"fs://{quote(os.fsencode(base))}/async_cache?capacity=10GiB",)


def hide_password(text: str) -> str:
    """A text without the users and passwords of the URLs in it, nor what parameters have that are called like one.

    The name of a file is no secret. What has no slashes before it, or a slash in the password, is hidden, too.
    """
    text = re.sub("//[^/?#]*@", "//***@", text)
    text = re.sub(r"""[^/?#\s'"]*:(?!/)[^\s'"]*@""", "***@", text)
    return re.sub(
        "([?&][^=&#]*(?:secret|password|token|key|sig)[^=&#]*(?<!_file)=)[^&#]*", r"\1***", text, flags=re.IGNORECASE
    )


class Given(NamedTuple):
    """A value that somebody has set, and where: a file, a variable, or a flag of the command line."""

    value: Any
    origin: str


@contextmanager
def prefixed(where: str) -> Iterator[None]:
    """Put a setting's name, or where it comes from, before what is wrong with it, or with a backend that it names."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except BackendError as error:
        raise BackendError(f"{where}: {error}") from error


@contextmanager
def told_where(given: Mapping[str, Given]) -> Iterator[None]:
    """Put where a setting comes from before an error that begins with its name; nothing where it is a default."""
    try:
        yield
    except (ConfigError, BackendError) as error:
        name = re.split(r"\W", str(error), maxsplit=1)[0]
        if name not in given:
            raise
        with prefixed(given[name].origin):
            raise


_LARGEST = 2**63 - 1
_MOST_SECONDS = 1e9  # 31 years: the timers of threads do not take every number
Seconds = Annotated[float, Meta(gt=0, le=_MOST_SECONDS, title="a number", description="more than 0 and at most 1e9")]
Share = Annotated[float, Meta(gt=0, le=1, title="a number", description="at most 1 and more than 0")]
Count = Annotated[int, Meta(gt=0, le=_LARGEST, title="a whole number", description="more than 0 and less than 2**63")]
Remembered = Annotated[int, Meta(gt=0, le=2**26, title="a whole number", description="from 1 to 2**26")]
Traces = Annotated[str, Meta(pattern="^(otel)?$", title="a text", description='"otel", or "" for none')]
Bytes = Annotated[Count, Meta(examples=["10GiB"])]  # may be written with a unit
Policy = Annotated[
    str, Meta(pattern=f"^({'|'.join(NAMES)})$", title="a name", description=f"one of {', '.join(NAMES)}")
]
URLs = Sequence[str]


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of settings, each checked by its type when the table is made."""

    SECTION: ClassVar[str] = ""
    """Its table in the file; the settings of the cache itself stand before all tables."""

    AT_START: ClassVar[frozenset[str]] = frozenset()
    """The settings that are used when a server starts, and not taken over when one that runs reads them anew."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            msgspec.structs.force_setattr(self, name, self.check(name, getattr(self, name)))

    @classmethod
    def check(cls, name: str, value: Any) -> Any:
        """The value, if the setting may have it; a list of URLs becomes a tuple. Raises ConfigError."""
        kind = cls._kind(name)
        if kind == URLs:
            if not isinstance(value, (list, tuple)):
                raise ConfigError(f"{name} must be a list of URLs, not one {type(value).__name__}")
            if not all(isinstance(url, str) for url in value):
                raise ConfigError(f"{name} must be a list of URLs")
            return tuple(value)
        plain, meta, *_ = get_args(kind)
        for wanted, told in ((plain, meta.title), (kind, meta.description)):
            try:
                msgspec.convert(value, wanted)
            except msgspec.ValidationError:
                raise ConfigError(f"{name} must be {told}, not {value!r}") from None
        return value

    @classmethod
    def parse(cls, name: str, text: str) -> Any:
        """The value of a setting that was written as text: a size may have a unit. Raises ConfigError."""
        kind = cls._kind(name)
        if kind == Bytes:
            with prefixed(name):
                size_bytes = parse_bytes(text)
            return cls.check(name, size_bytes)
        return cls.check(name, _parse_number(name, text) if kind in (Seconds, Share, Count, Remembered) else text)

    @classmethod
    def _kind(cls, name: str) -> Any:
        kinds = _kinds(cls)
        if name not in kinds:
            raise ConfigError(f"unknown setting {name!r}: there are {', '.join(kinds)}")
        return kinds[name]

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None, environ: Mapping[str, str] | None = None) -> Self:
        """Settings from a TOML file, if given, overridden by variables of the environment.

        Sizes may be written as "10GiB". In the environment, the URLs of a list are separated by white space.
        Raises ConfigError for an unknown key, a value that does not fit, or a file that cannot be read.
        """
        return cls.of(cls.given(path, environ))

    @classmethod
    def given(
        cls, path: str | os.PathLike[str] | None = None, environ: Mapping[str, str] | None = None
    ) -> dict[str, Given]:
        """What a file and the environment say, as it stands there, and where."""
        tables = {kind.SECTION for kind in Settings.__subclasses__()} - {""}
        values = _read_toml(path) if path is not None else {}
        if cls.SECTION:
            values = values.get(cls.SECTION, {})
            if not isinstance(values, dict):
                raise ConfigError(f"{path}: {cls.SECTION} must be a table")
            tables = set()
        given = {name: Given(value, str(path)) for name, value in values.items() if name not in tables}
        prefix = ENVIRONMENT_PREFIX + (f"{cls.SECTION.upper()}_" if cls.SECTION else "")
        others = tuple(f"{prefix}{table.upper()}_" for table in tables)
        for variable, text in (os.environ if environ is None else environ).items():
            if variable.startswith(prefix) and not variable.startswith(others):
                name = variable.removeprefix(prefix).lower()
                given[name] = Given(tuple(text.split()) if _kinds(cls).get(name) == URLs else text, variable)
        return given

    @classmethod
    def of(cls, given: Mapping[str, Given]) -> Self:
        """Settings from what was given, the defaults for the rest."""
        values = {}
        for name, (value, origin) in given.items():
            with prefixed(origin):
                values[name] = cls.parse(name, value) if isinstance(value, str) else cls.check(name, value)
        with told_where(given):
            return cls(**values)


@cache
def _kinds(table: type[Settings]) -> dict[str, Any]:
    """The type of each setting, which says what it may be."""
    return {setting.name: setting.type for setting in msgspec.structs.fields(table)}


def _parse_number(name: str, text: str) -> int | float:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    raise ConfigError(f"{name} must be a number, not {text!r}")


class CacheConfig(Settings, frozen=True, kw_only=True):
    """Settings of one cache. `docs/configuration.md` has them in a table.

    Raises ConfigError for a value that cannot be used. Its `repr` hides the passwords of URLs.
    """

    AT_START: ClassVar[frozenset[str]] = frozenset(("l1_bytes", "close_timeout_seconds", "explain_chunks", "traces"))

    l1_bytes: Bytes = 2**30
    """Size of L1, the arena in shared memory; rounded down to whole pages."""
    l2: URLs = field(default_factory=default_l2)
    """One URL for each storage backend, the fastest first; empty for a cache in memory only."""
    policy: Policy = "lru"
    """What leaves L1 first when it is full; docs/eviction.md tells the names."""
    lookup_timeout_seconds: Seconds = 1.0
    """How long a lookup waits for a backend before it goes on without it."""
    load_timeout_seconds: Seconds = 30.0
    """How long one batch of loads may take, from the start of its I/O."""
    store_timeout_seconds: Seconds = 30.0
    """How long one batch of write-back, or a deletion, may take."""
    result_ttl_seconds: Seconds = 60.0
    """How long a finished prefetch waits to be claimed or read."""
    lease_ttl_seconds: Seconds = 300.0
    """How long a claimed or read request may hold its leases."""
    reservation_ttl_seconds: Seconds = 300.0
    """How long a writer may go without a commit."""
    close_timeout_seconds: Seconds = 5.0
    """How long `close` waits for write-back, and then for I/O that does not end."""
    prefetch_share: Share = 0.75
    """The part of L1 that loads in flight may hold."""
    writeback_share: Share = 0.25
    """The part of L1 that writes in flight may hold."""
    load_inflight_bytes: Bytes = 256 * 2**20
    """Bytes that are asked of one backend at a time; further loads queue."""
    breaker_failures: Count = 3
    """Failures in a row after which a backend is left alone."""
    breaker_reset_seconds: Seconds = 5.0
    """How long it is left alone before one call tries it again."""
    explain_chunks: Remembered = 65_536
    """Of how many chunks that have left is remembered why: 40 bytes each."""
    traces: Traces = ""
    """`otel`: spans of OpenTelemetry for each prefetch."""

    @classmethod
    def check(cls, name: str, value: Any) -> Any:
        """The value, if the setting may have it. Raises ConfigError."""
        value = super().check(name, value)
        if name == "l1_bytes" and value < PAGE_BYTES:
            raise ConfigError(f"l1_bytes must be at least a page of {PAGE_BYTES} bytes, not {value}")
        return value

    def __repr__(self) -> str:
        return hide_password(super().__repr__())


_CHOICES = {"log_level": ("debug", "info", "warning", "error"), "log_format": ("text", "json")}


class TenantConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who may connect with one of these tokens, and which salts it may use; None is all."""

    tokens: tuple[str, ...]
    salts: tuple[str, ...] | None = None

    def __repr__(self) -> str:
        return f"TenantConfig(tokens=<hidden>, salts={self.salts!r})"


class ServerConfig(Settings, frozen=True, kw_only=True):
    """Settings of a server beside those of its cache. `docs/configuration.md` has them in a table.

    Raises ConfigError for a value that cannot be used.
    """

    SECTION: ClassVar[str] = "server"
    AT_START: ClassVar[frozenset[str]] = frozenset(("listen", "http", "shutdown_timeout_seconds", "log_format"))

    listen: URLs = field(default_factory=lambda: (default_url(),))
    """Where to listen: URLs of Unix sockets, and of TCP ports."""
    max_connections: Count = 4096
    """Connections at a time."""
    max_requests: Count = 4096
    """Prefetches, waits, reads and writers of one connection at a time."""
    hello_timeout_seconds: Seconds = 5.0
    """How long a new connection may take to introduce itself."""
    stall_timeout_seconds: Seconds = 30.0
    """How long a client may not read what it is sent."""
    shutdown_timeout_seconds: Seconds = 5.0
    """How long a shutdown may take."""
    http: str = "127.0.0.1:9600"
    """Where to answer HTTP, as host:port; empty for nowhere."""
    log_level: str = "info"
    """What is logged: debug, info, warning or error, and what is worse."""
    log_format: str = "text"
    """How it is logged: text, or json, an object in each line."""
    tenants: dict[str, TenantConfig] = {}
    """By name: their tokens, and their salts. A port beyond loopback needs one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for address in map(Address.parse, self.listen):
            if not address.is_local and not self.tenants:
                raise ConfigError(f"listen: {address} can be reached from other machines: it needs tenants with tokens")
        if self.http and not http_address(self.http).is_local and not self.tenants:
            raise ConfigError(f"http: {self.http} can be reached from other machines: it needs tenants with tokens")

    @classmethod
    def check(cls, name: str, value: Any) -> Any:
        """The value, if the setting may have it. Raises ConfigError, which tells no token."""
        if name == "tenants":
            return _check_tenants(value)
        if name in _CHOICES:
            if not isinstance(value, str) or value.lower() not in _CHOICES[name]:
                raise ConfigError(
                    f"{name} must be {', '.join(_CHOICES[name][:-1])} or {_CHOICES[name][-1]}, not {value!r}"
                )
            return value.lower()
        if name == "http":
            if not isinstance(value, str):
                raise ConfigError(f"http must be host:port, not {value!r}")
            if value:
                http_address(value)
            return value
        value = super().check(name, value)
        if name == "listen":
            _check_addresses(value)
        return value


def http_address(text: str) -> Address:
    """The address that `http` says. Raises ConfigError."""
    try:
        return Address.parse(f"tcp://{text}")
    except ConfigError as error:
        raise ConfigError(f"http must be host:port, not {text!r}") from error


def _check_addresses(urls: Sequence[str]) -> None:
    with prefixed("listen"):
        if not urls:
            raise ConfigError("a server needs an address")
        addresses: set[Address] = set()
        for address in map(Address.parse, urls):
            if address in addresses and (address.path or address.port):  # a port 0 is another one each time
                raise ConfigError(f"{address} is there twice")
            addresses.add(address)


def _check_tenants(value: Any) -> dict[str, TenantConfig]:
    try:
        tenants = msgspec.convert(msgspec.to_builtins(value), dict[str, TenantConfig])
    except (msgspec.ValidationError, TypeError) as error:
        raise ConfigError(f"tenants: {error}") from error
    tokens: set[str] = set()
    for tenant, config in tenants.items():
        for label in (tenant, *(config.salts or ())):
            _check_label(label)
        if not tenant:
            raise ConfigError("tenants: a tenant needs a name")
        if not config.tokens:
            raise ConfigError(f"tenants: {tenant!r} has no token")
        for token in config.tokens:
            if not 16 <= len(token) <= 512:
                raise ConfigError(f"tenants: a token of {tenant!r} does not have 16 to 512 characters")
            if token in tokens:
                raise ConfigError(f"tenants: a token of {tenant!r} is there twice")
            tokens.add(token)
    return tenants


def _check_label(label: str) -> None:
    try:
        check_label("a tenant or salt", label)
    except ValueError as error:
        raise ConfigError(f"tenants: {error}") from error


def _read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # a ValueError: no UTF-8, no TOML, a number beyond bounds
        raise ConfigError(f"cannot read {os.fspath(path)}: {error}") from error
