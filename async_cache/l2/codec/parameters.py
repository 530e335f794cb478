"""The parameters of a URL that say how objects are encoded: `codec` and `key_file`."""

import re
from typing import NamedTuple

from async_cache.errors import ConfigError

_CODEC = re.compile("none|(zstd)(?::([1-9]|1[0-9]))?(?:,(aes))?|(aes)")


class Steps(NamedTuple):
    """What `codec` asks for: to compress with zstd, at a level of its own, and to encrypt."""

    zstd: bool
    level: int | None
    aes: bool


def codec(text: str) -> Steps:
    """The steps of "none", "zstd", "zstd:3", "aes", "zstd,aes" or "zstd:3,aes". Raises ConfigError for others."""
    if "fp8" in text.split(","):
        raise ConfigError("fp8 loses bits, so it is no way to store a layout, but a layout: docs/backends/codecs.md")
    match = _CODEC.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not none, zstd, zstd:1 to zstd:19, aes, or zstd and aes with a comma between")
    return Steps(bool(match[1]), int(match[2]) if match[2] else None, bool(match[3] or match[4]))


def key_file(text: str) -> str:
    """An absolute path. Raises ConfigError."""
    if not text.startswith("/") or "\0" in text:
        raise ConfigError(f"the path {text!r} is not absolute")
    return text
