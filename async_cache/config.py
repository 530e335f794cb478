"""The settings, built once at the edge: from arguments, or from a TOML file and the environment."""

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self
from urllib.parse import quote

import msgspec
from msgspec import Struct, field

from async_cache.errors import ConfigError
from async_cache.prompt.keys import check_label
from async_cache.protocol.address import Address, default_url

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
    return (f"fs://{quote(base)}/async_cache?capacity=10GiB",)


class Given(NamedTuple):
    """A value that somebody has set, and where: a file, a variable, or a flag of the command line."""

    value: Any
    origin: str


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of settings, checked when it is made."""

    SECTION: ClassVar[str] = ""
    """Its table in the file; the settings of the cache itself stand before all tables."""

    def __post_init__(self) -> None:
        for setting in msgspec.structs.fields(self):
            self._check(setting.name, setting.type, getattr(self, setting.name))

    def _check(self, name: str, kind: Any, value: Any) -> None:
        if kind == Sequence[str]:
            if not isinstance(value, (list, tuple)):
                raise ConfigError(f"{name} must be a list of URLs, not one {type(value).__name__}")
            if not all(isinstance(url, str) for url in value):
                raise ConfigError(f"{name} must be a list of URLs")
            msgspec.structs.force_setattr(self, name, tuple(value))
            return
        whole = kind is int
        if type(value) is bool or not isinstance(value, int if whole else (int, float)):
            raise ConfigError(f"{name} must be {'a whole number' if whole else 'a number'}, not {value!r}")
        if not 0 < value < float("inf"):
            raise ConfigError(f"{name} must be more than 0, not {value!r}")
        if whole and value >= 2**63:
            raise ConfigError(f"{name} must be less than 2**63, not {value!r}")
        if name.endswith("_share") and value > 1:
            raise ConfigError(f"{name} must be at most 1, not {value!r}")

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None, environ: Mapping[str, str] | None = None) -> Self:
        """Settings from a TOML file, if given, overridden by variables of the environment.

        Sizes may be written as "10GiB". In the environment, the URLs of a list are separated by white space.
        Raises ConfigError for an unknown key, a value that does not fit, or a file that can not be read.
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
                raise ConfigError(f"{cls.SECTION} must be a table")
            tables = set()
        given = {name: Given(value, str(path)) for name, value in values.items() if name not in tables}
        prefix = ENVIRONMENT_PREFIX + (f"{cls.SECTION.upper()}_" if cls.SECTION else "")
        others = tuple(f"{prefix}{table.upper()}_" for table in tables)
        for variable, text in (os.environ if environ is None else environ).items():
            if variable.startswith(prefix) and not variable.startswith(others):
                given[variable.removeprefix(prefix).lower()] = Given(text, variable)
        return given

    @classmethod
    def of(cls, given: Mapping[str, Given]) -> Self:
        """Settings from what was given, the defaults for the rest."""
        values = {}
        for name, (value, origin) in given.items():
            try:
                values[name] = cls._convert(name, value)
            except ConfigError as error:
                raise ConfigError(f"{origin}: {error}") from error
        return cls(**values)

    @classmethod
    def _convert(cls, name: str, value: Any) -> Any:
        kinds = {setting.name: setting.type for setting in msgspec.structs.fields(cls)}
        if name not in kinds:
            raise ConfigError(f"unknown setting {name!r}: there are {', '.join(kinds)}")
        if not isinstance(value, str):
            return value
        if kinds[name] == Sequence[str]:
            return tuple(value.split())
        if kinds[name] not in (int, float):
            raise ConfigError(f"{name} must be tables of the file")
        if name.endswith("_bytes"):
            return parse_bytes(value)
        try:
            return int(value) if kinds[name] is int else float(value)
        except ValueError:
            raise ConfigError(f"{name} must be a number, not {value!r}") from None


class CacheConfig(Settings, frozen=True, kw_only=True):
    """Settings of one cache. `docs/configuration.md` has them in a table.

    Raises ConfigError for a value that can not be used.
    """

    l1_bytes: int = 2**30
    """Size of L1, the arena in shared memory; rounded down to whole pages."""
    l2: Sequence[str] = field(default_factory=default_l2)
    """One URL for each storage backend, the fastest first; empty for a cache in memory only."""
    lookup_timeout_seconds: float = 1.0
    """How long a lookup waits for a backend before it goes on without it."""
    load_timeout_seconds: float = 30.0
    """How long one batch of loads may take, from the start of its I/O."""
    store_timeout_seconds: float = 30.0
    """How long one batch of write-back, or a deletion, may take."""
    result_ttl_seconds: float = 60.0
    """How long a finished prefetch waits to be claimed or read."""
    lease_ttl_seconds: float = 300.0
    """How long a claimed or read request may hold its leases."""
    reservation_ttl_seconds: float = 300.0
    """How long a writer may go without a commit."""
    close_timeout_seconds: float = 5.0
    """How long `close` waits for write-back, and then for I/O that does not end."""
    prefetch_share: float = 0.75
    """The part of L1 that loads in flight may hold."""
    writeback_share: float = 0.25
    """The part of L1 that writes in flight may hold."""
    load_inflight_bytes: int = 256 * 2**20
    """Bytes that are asked of one backend at a time; further loads queue."""
    breaker_failures: int = 3
    """Failures in a row after which a backend is left alone."""
    breaker_reset_seconds: float = 5.0
    """How long it is left alone before one call tries it again."""


class TenantConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who may connect with one of these tokens, and which salts it may use; None is all."""

    tokens: tuple[str, ...]
    salts: tuple[str, ...] | None = None

    def __repr__(self) -> str:
        return f"TenantConfig(tokens=<hidden>, salts={self.salts!r})"


class ServerConfig(Settings, frozen=True, kw_only=True):
    """Settings of a server beside those of its cache. `docs/configuration.md` has them in a table.

    Raises ConfigError for a value that can not be used.
    """

    SECTION: ClassVar[str] = "server"

    listen: Sequence[str] = field(default_factory=lambda: (default_url(),))
    """Where to listen: URLs of Unix sockets, and of TCP ports."""
    max_connections: int = 4096
    """Connections at a time."""
    max_requests: int = 4096
    """Prefetches, waits, reads and writers of one connection at a time."""
    hello_timeout_seconds: float = 5.0
    """How long a new connection may take to introduce itself."""
    stall_timeout_seconds: float = 30.0
    """How long a client may not read what it is sent."""
    shutdown_timeout_seconds: float = 5.0
    """How long a shutdown may take."""
    tenants: dict[str, TenantConfig] = {}
    """By name: their tokens, and their salts. A port beyond loopback needs one."""

    def _check(self, name: str, kind: Any, value: Any) -> None:
        if name != "tenants":
            super()._check(name, kind, value)
            return
        try:
            tenants = msgspec.convert(msgspec.to_builtins(value), type=kind)
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
        msgspec.structs.force_setattr(self, name, tenants)

    def __post_init__(self) -> None:
        super().__post_init__()
        addresses = [Address.parse(url) for url in self.listen]
        if not addresses:
            raise ConfigError("listen: a server needs an address")
        for address in addresses:
            if not address.is_local and not self.tenants:
                raise ConfigError(f"{address} can be reached from other machines: it needs tenants with tokens")


def _check_label(label: str) -> None:
    try:
        check_label("a tenant or salt", label)
    except ValueError as error:
        raise ConfigError(f"tenants: {error}") from error


def _read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"can not read {os.fspath(path)}: {error}") from error
