"""The settings of a server beside those of its cache."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import msgspec
from msgspec import Struct, field

from async_cache.config.settings import Bytes, Count, Seconds, Settings, URLs, prefixed
from async_cache.config.texts import parse_bytes
from async_cache.errors import ConfigError
from async_cache.limits import TenantLimits
from async_cache.prompt.keys import check_label
from async_cache.protocol.address import Address, default_url

LEAST_RECORD_BYTES = 2**20
_CHOICES = {"log_level": ("debug", "info", "warning", "error"), "log_format": ("text", "json")}


class TenantConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who may connect with one of these tokens, and which salts it may use; None is all."""

    tokens: tuple[str, ...]
    salts: tuple[str, ...] | None = None
    role: Literal["all", "read", "store", "watch"] = "all"
    """Whether it may only look up and read, or only store and delete, or only see the statistics of all."""
    limits: dict[str, Any] = {}
    """Those of its limits that are not the ones of all tenants: see `limits.TenantLimits`."""

    def __repr__(self) -> str:
        return f"TenantConfig(tokens=<hidden>, salts={self.salts!r}, role={self.role!r}, limits={self.limits!r})"


class ServerConfig(Settings, frozen=True, kw_only=True):
    """Settings of a server beside those of its cache. `docs/configuration.md` has them in a table.

    Raises ConfigError for a value that cannot be used.
    """

    SECTION: ClassVar[str] = "server"
    AT_START: ClassVar[frozenset[str]] = frozenset(("listen", "http", "shutdown_timeout_seconds", "log_format"))

    listen: URLs = field(default_factory=lambda: (default_url(),))
    """Where to listen: URLs of Unix sockets, and of TCP ports, there with TLS or without."""
    max_connections: Count = 4096
    """Connections at a time."""
    max_requests: Count = 4096
    """Prefetches, waits, reads and writers of one connection at a time."""
    max_message_objects: Count = 131_072
    """Objects of the prompts of one message together: their chunks by the objects of each."""
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
    record: str = ""
    """The file that requests are recorded to; empty for none."""
    record_bytes: Bytes = 2**28
    """What it may take, with the files that were full before it."""
    tenants: dict[str, TenantConfig] = field(default_factory=dict)
    """By name: their tokens, their salts and their own limits. A port beyond loopback needs one."""
    limits: TenantLimits = TenantLimits()
    """Of each tenant that has no others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tenant_limits()
        for address in map(Address.parse, self.listen):
            if not address.is_local and not self.tenants:
                raise ConfigError(f"listen: {address} can be reached from other machines: it needs tenants with tokens")
        if self.http and not http_address(self.http).is_local and not self.tenants:
            raise ConfigError(f"http: {self.http} can be reached from other machines: it needs tenants with tokens")

    def tenant_limits(self) -> dict[str, TenantLimits]:
        """The limits of each tenant, by its name.

        Where a share is None, the only tenant may hold all of L1, and one of several a half. What is not to be kept for
        some is kept in equal parts, for each of the others and for all together who need no token.
        """
        of = {
            name: _check_limits(f"tenants.{name}.limits", tenant.limits, self.limits)
            for name, tenant in self.tenants.items()
        }
        held = 1.0 if len(of) == 1 else 0.5
        kept = [limits.kept_share for limits in of.values() if limits.kept_share is not None]
        if sum(kept) > 1:
            raise ConfigError(
                f"limits: by kept_share, {sum(kept):.4g} of L1 would be kept, which is more than all of it"
            )
        part = (1 - sum(kept)) / (len(of) - len(kept) + 1)
        return {
            name: msgspec.structs.replace(
                limits,
                leased_share=limits.leased_share or held,
                reserved_share=limits.reserved_share or held,
                kept_share=part if limits.kept_share is None else limits.kept_share,
            )
            for name, limits in of.items()
        }

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
        if name == "record":
            if not isinstance(value, str) or "\0" in value or (value and not value.startswith("/")):
                raise ConfigError(f"record must be the absolute path of a file, not {value!r}")
            return value
        if name == "limits":
            return _check_limits("limits", msgspec.to_builtins(value))
        value = super().check(name, value)
        if name == "record_bytes" and value < LEAST_RECORD_BYTES:
            raise ConfigError(f"record_bytes must be at least 1MiB, not {value}")
        if name == "listen":
            _check_addresses(value)
        return value


def http_address(text: str) -> Address:
    """The address that `http` says. Raises ConfigError."""
    try:
        return Address.parse(f"tcp://{text}")
    except ConfigError as error:
        raise ConfigError(f"http must be host:port, not {text!r}") from error


def _check_limits(where: str, given: Any, others: TenantLimits | None = None) -> TenantLimits:
    """Limits as they are given, and others where they are not. Raises ConfigError, which names the limit."""
    if not isinstance(given, dict):
        raise ConfigError(f"{where} must be a table")
    values = dict(given)
    for name, value in given.items():
        if name.endswith("_bytes") or name == "stored_bytes_per_second":
            with prefixed(f"{where}: {name}"):
                values[name] = parse_bytes(value) if isinstance(value, str) else value
    if others is not None:
        values = msgspec.structs.asdict(others) | values
    try:
        return msgspec.convert(values, TenantLimits)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from error


def _check_addresses(urls: Sequence[str]) -> None:
    with prefixed("listen"):
        if not urls:
            raise ConfigError("a server needs an address")
        addresses: set[Address] = set()
        for address in map(Address.parse, urls):
            if address.tls is not None and not address.tls.cert:
                raise ConfigError(f"{address} needs a certificate: {address}?cert=FILE&key=FILE")
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
