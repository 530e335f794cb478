"""Tensors over the arena's memory: the one module that imports torch, itself imported when tensors are asked for."""

from collections.abc import Sequence

import torch

from async_cache.layout import ObjectGroup


def over(views: Sequence[memoryview | None], groups: Sequence[ObjectGroup]) -> "tuple[torch.Tensor | None, ...]":
    """One tensor of the group's shape and dtype for each view, without a copy; None where there is no view."""
    return tuple(
        torch.frombuffer(view, dtype=getattr(torch, group.dtype)).view(group.shape) if view is not None else None
        for view, group in zip(views, groups, strict=True)
    )
