"""Tables of settings: each checked by its type, and where it was set told with what is wrong."""

import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Self, get_args

import msgspec
from msgspec import Meta, Struct

from async_cache.config.texts import parse_bytes
from async_cache.errors import BackendError, ConfigError

ENVIRONMENT_PREFIX = "ASYNC_CACHE_"
LARGEST = 2**63 - 1
_MOST_SECONDS = 1e9  # 31 years: the timers of threads do not take every number
Seconds = Annotated[float, Meta(gt=0, le=_MOST_SECONDS, title="a number", description="more than 0 and at most 1e9")]
Share = Annotated[float, Meta(gt=0, le=1, title="a number", description="at most 1 and more than 0")]
Count = Annotated[int, Meta(gt=0, le=LARGEST, title="a whole number", description="more than 0 and less than 2**63")]
Rate = Annotated[int, Meta(ge=0, le=LARGEST, title="a whole number", description="0 or more and less than 2**63")]
Remembered = Annotated[int, Meta(gt=0, le=2**26, title="a whole number", description="from 1 to 2**26")]
Traces = Annotated[str, Meta(pattern="^(otel)?$", title="a text", description='"otel", or "" for none')]
Bytes = Annotated[Count, Meta(examples=["10GiB"])]  # may be written with a unit
URLs = Sequence[str]


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
        return cls.check(name, _parse_number(name, text) if kind in (Seconds, Share, Count, Rate, Remembered) else text)

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


def _read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # a ValueError: no UTF-8, no TOML, a number beyond bounds
        raise ConfigError(f"cannot read {os.fspath(path)}: {error}") from error
