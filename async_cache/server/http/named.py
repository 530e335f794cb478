"""Values as JSON has them."""

import math
from typing import Any

import msgspec


def named(value: msgspec.Struct) -> dict[str, Any]:
    """The fields of a value by their names, and those of values within it; a number that has no bound is None."""
    return {name: _plain(getattr(value, name)) for name in value.__struct_fields__}


def _plain(value: object) -> Any:
    if isinstance(value, msgspec.Struct):
        return named(value)
    if isinstance(value, list | tuple):
        return list(map(_plain, value))
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return msgspec.to_builtins(value)
