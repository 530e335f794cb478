"""The settings, built once at the edge: from arguments, or from a TOML file and the environment."""

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import msgspec
from msgspec import Struct, field

from async_cache.errors import ConfigError

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


class CacheConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one cache. `docs/configuration.md` has them in a table.

    Raises ConfigError for a value that can not be used.
    """

    l1_bytes: int = 2**30
    """Size of L1, the arena in shared memory; rounded down to whole pages."""
    l2: tuple[str, ...] = field(default_factory=default_l2)
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

    def __post_init__(self) -> None:
        if not isinstance(self.l2, (list, tuple)):
            raise ConfigError(f"l2 must be a list of URLs, not one {type(self.l2).__name__}")
        msgspec.structs.force_setattr(self, "l2", tuple(self.l2))
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if name == "l2":
                if not all(isinstance(url, str) for url in value):
                    raise ConfigError("l2 must be a list of URLs")
                continue
            whole = name.endswith("_bytes") or name == "breaker_failures"
            if type(value) is bool or not isinstance(value, int if whole else (int, float)):
                raise ConfigError(f"{name} must be {'a whole number' if whole else 'a number'}, not {value!r}")
            if not 0 < value < float("inf"):
                raise ConfigError(f"{name} must be more than 0, not {value!r}")
            if name.endswith("_share") and value > 1:
                raise ConfigError(f"{name} must be at most 1, not {value!r}")

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None, environ: Mapping[str, str] | None = None) -> Self:
        """Settings from a TOML file, if given, overridden by `ASYNC_CACHE_<NAME>` in the environment.

        Sizes may be written as "10GiB". In the environment, the URLs of `l2` are separated by white space.
        Raises ConfigError for an unknown key, a value that does not fit, or a file that can not be read.
        """
        values = _read_toml(path) if path is not None else {}
        for variable, text in (os.environ if environ is None else environ).items():
            if variable.startswith(ENVIRONMENT_PREFIX):
                values[variable.removeprefix(ENVIRONMENT_PREFIX).lower()] = text
        try:
            return cls(**{name: _convert(name, value) for name, value in values.items()})
        except TypeError as error:
            raise ConfigError(str(error)) from error


def _read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"can not read {os.fspath(path)}: {error}") from error


def _convert(name: str, value: Any) -> Any:
    if name not in CacheConfig.__struct_fields__:
        raise ConfigError(f"unknown setting {name!r}: there are {', '.join(CacheConfig.__struct_fields__)}")
    if not isinstance(value, str):
        return value
    if name == "l2":
        return tuple(value.split())
    if name.endswith("_bytes"):
        return parse_bytes(value)
    try:
        return int(value) if name == "breaker_failures" else float(value)
    except ValueError:
        raise ConfigError(f"{name} must be a number, not {value!r}") from None
