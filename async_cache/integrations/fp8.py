"""KV in eight bits: float8_e4m3fn with a scale for each head of each chunk. Half of bfloat16, and lossy.

What is lossy is another layout, and not a way to store the same one. Bytes that were rounded once look like any others:
if they came out of a store under the name of the exact ones, memory would hand them out as those, write them back to
every other store, and so would be what a model computes behind them. So they have their own root of chunk hashes, from
the first chunk on, and meet exact bytes nowhere: not in memory, not in a store, not in the prefix of a later chunk.

Needs torch.
"""

from dataclasses import replace

import torch

from async_cache.prompt.layout import ModelLayout
from async_cache.prompt.objects import ObjectGroup

DTYPE = "float8_e4m3fn"
MAX = 448.0  # the largest float8_e4m3fn


def fp8_layout(layout: ModelLayout) -> ModelLayout:
    """The layout whose objects are those of this one in eight bits.

    In place of a group of shape (..., tokens, width), it has a group of float32 scales of shape (...), and one of
    float8_e4m3fn of the same shape. Raises ValueError for a group of less than three dimensions, or of no floats.
    """
    groups: list[ObjectGroup] = []
    for group in layout.groups:
        if len(group.shape) < 3 or group.dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"fp8 is for floats of shape (..., tokens, width), not for {group.dtype} of {group.shape}")
        groups.append(replace(group, shape=group.shape[:-2], dtype="float32"))
        groups.append(replace(group, dtype=DTYPE))
    dtypes = ",".join(group.dtype for group in layout.groups)
    return replace(layout, groups=tuple(groups), revision=f"{layout.revision} fp8 of {dtypes}".strip())


def to_fp8(kv: torch.Tensor, scales: torch.Tensor, into: torch.Tensor) -> None:
    """Round KV of shape (..., tokens, width): `into` is of the same shape, `scales` of (...).

    The largest number of each head becomes the largest one that eight bits can say. Zeros stay zeros.
    """
    with torch.no_grad():
        exact = kv.to(torch.float32)
        largest = exact.abs().amax(dim=(-2, -1))
        scales.copy_(torch.where(largest > 0, largest / MAX, 1.0).clamp(min=torch.finfo(torch.float32).tiny))
        into.copy_((exact / scales[..., None, None]).clamp(-MAX, MAX).to(torch.float8_e4m3fn))


def from_fp8(scales: torch.Tensor, rounded: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The KV that `to_fp8` has rounded, as near to it as eight bits are."""
    return (rounded.to(torch.float32) * scales[..., None, None]).to(dtype)
