"""Exports: the facade names exactly what users need, each with a docstring; the tree of errors is the one drawn."""

import inspect
import re
from types import ModuleType

import pytest

import async_cache
from async_cache import errors

ERRORS = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}


def tree(error: type[Exception], depth: int = 0) -> list[tuple[int, str]]:
    """The errors below one, in the order of their definition, with their depth."""
    below = [one for child in error.__subclasses__() if child in ERRORS.values() for one in tree(child, depth + 1)]
    return [(depth, error.__name__), *below]


def test_all_is_what_the_package_exports() -> None:
    public = {
        name
        for name, value in vars(async_cache).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert sorted(async_cache.__all__) == sorted(public)


@pytest.mark.parametrize("name", async_cache.__all__)
def test_an_exported_name_is_documented(name: str) -> None:
    value = getattr(async_cache, name)
    assert value.__name__ == name
    assert "__doc__" in vars(value) or inspect.isfunction(value)
    assert value.__doc__ and not value.__doc__.startswith(f"{name}(")


def test_every_error_is_exported() -> None:
    assert set(ERRORS) <= set(async_cache.__all__)


def test_the_errors_are_those_of_the_tree_that_is_drawn() -> None:
    drawn = re.findall(r"^    ([│├└─ ]*)(\w+)(?: \((\w+)\))?", errors.__doc__ or "", re.MULTILINE)
    assert [(len(indent) // 4, name) for indent, name, _ in drawn] == tree(errors.AsyncCacheError)
    for _, name, builtin in drawn:
        bases = {base.__name__ for base in ERRORS[name].__bases__} - set(ERRORS) - {"Exception"}
        assert bases == ({builtin} if builtin else set())


def test_an_unknown_request_reads_like_a_sentence() -> None:
    assert str(errors.UnknownRequestError("no request 'a'")) == "no request 'a'"
    assert str(errors.UnknownRequestError()) == ""
