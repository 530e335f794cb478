"""The settings of a cache."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar
from urllib.parse import quote, unquote

from msgspec import Meta, field

from async_cache.config.settings import (
    LARGEST,
    Bytes,
    Count,
    Rate,
    Remembered,
    Seconds,
    Settings,
    Share,
    Traces,
    URLs,
    prefixed,
)
from async_cache.config.texts import hide_password, parse_bytes
from async_cache.errors import ConfigError
from async_cache.prompt.keys import check_label
from async_cache.prompt.objects import PAGE_BYTES
from async_cache.retention.policies import NAMES
from async_cache.retention.quotas import Quota

Policy = Annotated[
    str, Meta(pattern=f"^({'|'.join(NAMES)})$", title="a name", description=f"one of {', '.join(NAMES)}")
]


def default_l2() -> tuple[str, ...]:
    """A directory under the user's cache directory, bounded to 10 GiB: one for each version of the format on disk."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not base.startswith("/"):  # the XDG specification has relative paths ignored
        try:
            base = str(Path.home() / ".cache")
        except RuntimeError as error:
            raise ConfigError("there is no home directory to keep the cache in: set l2") from error
        if not base.startswith("/"):
            raise ConfigError(f"the home directory {os.path.dirname(base)!r} is not absolute: set l2")
    return (f"fs://{quote(os.fsencode(base))}/async_cache-2?capacity=10GiB",)


def parse_quota(text: str) -> Quota:
    """A quota as it is written: `salt?model=name&l1=size&l2=size`, with `*` for any salt. Raises ConfigError."""
    salt, mark, parameters = text.partition("?")
    given: dict[str, str] = {}
    for part in parameters.split("&"):
        name, equals, value = part.partition("=")
        if not equals or name not in ("model", "l1", "l2") or name in given:
            raise ConfigError(f"{text!r}: write salt?model=name&l1=size&l2=size, each once, and at least one size")
        given[name] = unquote(value)
    sizes = {name: parse_bytes(given[name]) for name in ("l1", "l2") if name in given}
    if not mark or not sizes or not all(0 < size <= LARGEST for size in sizes.values()):
        raise ConfigError(f"{text!r}: a quota is more than 0 bytes, of l1, of l2, or of both")
    if "model" in given and not given["model"]:
        raise ConfigError(f"{text!r}: the name of a model is not empty")
    try:
        check_label("a salt", unquote(salt))
    except ValueError as error:
        raise ConfigError(f"{text!r}: {error}") from error
    return Quota(None if salt == "*" else unquote(salt), given.get("model"), sizes.get("l1"), sizes.get("l2"))


def _check_quotas(texts: Sequence[str]) -> None:
    whose = [(quota.salt, quota.model) for quota in map(parse_quota, texts)]
    for one in whose:
        if whose.count(one) > 1:
            raise ConfigError(f"there are two quotas for the salt {one[0]!r} and the model {one[1]!r}")


class CacheConfig(Settings, frozen=True, kw_only=True):
    """Settings of one cache. `docs/configuration.md` has them in a table.

    Raises ConfigError for a value that cannot be used. What the URLs of `l2` name is looked at by who opens a cache by
    them: `AsyncCache(config)` raises for a scheme or a parameter that there is not. Its `repr` hides the passwords
    of URLs.
    """

    AT_START: ClassVar[frozenset[str]] = frozenset(
        ("l1_bytes", "policy", "close_timeout_seconds", "explain_chunks", "traces")
    )

    l1_bytes: Bytes = 2**30
    """Size of L1, the arena in shared memory; rounded down to whole pages."""
    l2: URLs = field(default_factory=default_l2)
    """One URL for each storage backend, the fastest first; empty for a cache in memory only."""
    policy: Policy = "lru"
    """What leaves L1 first when it is full; docs/eviction.md tells the names."""
    quotas: URLs = ()
    """How much a salt may have of L1, and of each backend: `"salt?l1=2GiB&l2=20GiB"`, docs/eviction.md has more."""
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
    retain_share: Share = 0.25
    """The part of each tier that one salt may have retained."""
    prefill_tokens_per_second: Rate = 0
    """How fast the engines compute a prompt; 0: not known. Lookups then say where that is faster than a load."""
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
        if name == "quotas" and not (isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value)):
            raise ConfigError(f'quotas must be a list of texts as "salt?l1=2GiB", not {value!r}')
        value = super().check(name, value)
        if name == "l1_bytes" and value < PAGE_BYTES:
            raise ConfigError(f"l1_bytes must be at least a page of {PAGE_BYTES} bytes, not {value}")
        if name == "quotas":
            with prefixed("quotas"):
                _check_quotas(value)
        return value

    @property
    def parsed_quotas(self) -> list[Quota]:
        """The quotas as they are meant."""
        return list(map(parse_quota, self.quotas))

    def __repr__(self) -> str:
        return hide_password(super().__repr__())
