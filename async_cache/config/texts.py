"""Texts in settings: sizes, and URLs that are shown."""

import re

from async_cache.errors import ConfigError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str) -> int:
    """`"10GiB"`, `"512 MB"` or `"4096"` as a number of bytes."""
    match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f"{text!r} is not a size: write a number and B, KiB, MiB, GiB, TiB, KB, MB, GB or TB")
    unit = _UNITS[match[2].upper()]
    return int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


def hide_password(text: str) -> str:
    """A text without the users and passwords of the URLs in it, nor what parameters have that are called like one.

    The name of a file is no secret. What has no slashes before it, or a slash in the password, is hidden, too.
    """
    text = re.sub("//[^/?#]*@", "//***@", text)
    text = re.sub(r"""[^/?#\s'"]*:(?!/)[^\s'"]*@""", "***@", text)
    return re.sub(
        "([?&][^=&#]*(?:secret|password|token|key|sig)[^=&#]*(?<!_file)=)[^&#]*", r"\1***", text, flags=re.IGNORECASE
    )
