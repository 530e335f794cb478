"""The URL of a backend, split into its parts: what a scheme makes its backend from."""

import asyncio
import re
from collections.abc import Callable
from typing import Any, Self
from urllib.parse import SplitResult, parse_qsl, urlsplit

from async_cache.config import hide_password, parse_bytes
from async_cache.errors import ConfigError
from async_cache.retention.policies import make_policy
from async_cache.retention.policy import EvictionPolicy

_FILES = ("ca", "cert", "key", "key_file", "password_file")  # whose names need not be text


class BackendURL(SplitResult):
    """The URL of a backend, as `urllib.parse.urlsplit` splits it: scheme, netloc, path, query, hostname, port ...

    Nothing in it is percent-decoded, but the values that `parameters` returns. Its `repr` hides user and password.
    """

    __slots__ = ()

    @classmethod
    def parse(cls, url: str) -> Self:
        """Split a URL. Raises ConfigError where it cannot be split."""
        try:
            parts = cls(*urlsplit(url))
        except ValueError as error:
            raise ConfigError(str(error)) from error
        _, colon, port = parts.netloc.rpartition(":")
        if colon and "@" in url.partition(parts.netloc)[2] and not re.fullmatch(r"\d*|.*\]", port):
            raise ConfigError("in a password, write %2F for /, %3F for ? and %23 for #")
        return parts

    def parameters(self, **parsers: Callable[[str], Any]) -> dict[str, Any]:
        """The parameters of the query, parsed; what the URL does not say is left out.

        `parsers` has every parameter that the URL may have, and what makes a value of its text, or raises ValueError.
        Raises ConfigError for a parameter that is unknown, repeated, malformed or refused by its parser, and for a
        fragment, which would mean nothing.
        """
        if self.fragment:
            raise ConfigError("a fragment means nothing here")
        values: dict[str, Any] = {}
        try:
            strict = bool(self.query)
            given = parse_qsl(self.query, keep_blank_values=True, strict_parsing=strict, errors="surrogateescape")
        except ValueError as error:
            raise ConfigError(str(error)) from error
        for name, text in given:
            if name not in parsers:
                raise ConfigError(f"unknown parameter {name!r}")
            if name in values:
                raise ConfigError(f"parameter {name!r} is repeated")
            try:
                if name not in _FILES:
                    text.encode()
                values[name] = parsers[name](text)
            except ValueError as error:
                raise ConfigError(f"{name}: {error}") from error
        return values

    def __repr__(self) -> str:
        return f"{type(self).__name__}({hide_password(self.geturl())!r})"


# Parsers of parameters.


def capacity(text: str) -> int | None:
    """A size in bytes, such as "10GiB", or None for "none": no bound."""
    if text == "none":
        return None
    size_bytes = parse_bytes(text)
    if not size_bytes:
        raise ConfigError('must be more than 0, or "none" for no bound')
    return size_bytes


def size(text: str) -> int:
    """A size in bytes, such as "10GiB"."""
    size_bytes = parse_bytes(text)
    if not size_bytes:
        raise ConfigError("must be more than 0")
    return size_bytes


def a_policy(text: str) -> EvictionPolicy[Any]:
    """A new eviction policy, by its name. It goes by the clock of the loop in which it is used."""
    return make_policy(text, lambda: asyncio.get_running_loop().time())


def one_of(**values: Any) -> Callable[[str], Any]:
    """A parser of a word, which returns the value that is given for it."""

    def parse(text: str) -> Any:
        if text not in values:
            raise ConfigError(f"{text!r} is not {' or '.join(values)}")
        return values[text]

    return parse


def whole_number(most: int) -> Callable[[str], int]:
    """A parser of a number from 1 to `most`."""

    def parse(text: str) -> int:
        if not re.fullmatch("[1-9][0-9]{0,17}", text) or int(text) > most:
            raise ConfigError(f"{text!r} is not a number from 1 to {most}")
        return int(text)

    return parse
