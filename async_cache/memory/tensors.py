"""Tensors over memory that others own: the one place that imports torch, and only when tensors are asked for."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from async_cache.prompt.objects import ObjectGroup

if TYPE_CHECKING:
    import torch


def over(views: Iterable[memoryview | None], groups: Sequence[ObjectGroup]) -> "tuple[torch.Tensor | None, ...]":
    """One tensor of the group's shape and dtype for each view, without a copy; None where there is no view.

    Raises ImportError, which names the extra to install, where there is no torch.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ImportError("tensors need torch: pip install 'async-kv-cache[torch]', or use `views`") from error
    return tuple(
        torch.frombuffer(view, dtype=getattr(torch, group.dtype)).view(group.shape) if view is not None else None
        for view, group in zip(views, groups, strict=True)
    )
