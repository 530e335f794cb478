"""Pages as rows of bytes, by what their tensors say of themselves: shape, strides, and the storage that they lie in.

Engines arrange pages in many ways: heads before tokens or behind them, layers in tensors of their own or side by side
in one, pages with room between them, latent vectors with scales inside. To be copied, a page has to be one run of
bytes; what the bytes mean is for the identity of a layout to say.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch

from async_cache.errors import ConfigError
from async_cache.prompt.objects import ObjectGroup

_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))
"""What rows are copied as, the widest that fits: bits are bits."""


def rows_of(caches: Sequence[torch.Tensor], group: ObjectGroup) -> list[torch.Tensor]:
    """The pages of a group's layers, as views (layers, blocks, words) without a copy: one, if the layers lie evenly.

    `caches` are (blocks, ...), a tensor for each layer, in the order in which an object (layers, blocks, ...) has them.
    Raises ConfigError for pages that are no rows, or not those of the group.
    """
    pages = [_Page(cache) for cache in caches]
    first = pages[0]
    layers, blocks = group.shape[:2]
    if len(pages) != layers or any(page.size_bytes * layers * blocks != group.size_bytes for page in pages):
        raise ConfigError(
            f"pages of {first.size_bytes} bytes in {len(pages)} layers are not those of objects of {group.size_bytes}"
            f" bytes, which have {blocks} in {layers}: the pages of keys and values may lie in two tensors"
        )
    if any(page.blocks != first.blocks for page in pages):
        raise ConfigError("the layers of a group have different numbers of blocks")
    word_bytes, word = _word_of(pages)
    return [
        torch.empty(0, dtype=word, device=first.storage.device).set_(
            run[0].storage,
            run[0].at // word_bytes,
            (len(run), first.blocks, first.size_bytes // word_bytes),
            ((run[1].at - run[0].at if len(run) > 1 else 0) // word_bytes, run[0].stride // word_bytes, 1),
        )
        for run in _runs(pages)
    ]


class _Page:
    """Where the pages of a layer are in its storage: the first one `at`, each `stride` bytes behind the one before."""

    def __init__(self, cache: torch.Tensor):
        if cache.dim() < 2 or not cache.numel():
            raise ConfigError(f"a tensor of shape {tuple(cache.shape)} has no pages")
        expected = 1
        for stride, size in sorted(zip(cache.stride()[1:], cache.shape[1:], strict=True)):
            if size > 1 and stride != expected:
                raise ConfigError(
                    f"a page of shape {tuple(cache.shape[1:])} and strides {cache.stride()[1:]} is no run of bytes:"
                    " another layer, or room, lies inside it"
                )
            expected *= size
        self.storage = cache.untyped_storage()
        self.blocks = cache.shape[0]
        self.at = cache.storage_offset() * cache.itemsize
        self.size_bytes = expected * cache.itemsize
        self.stride = cache.stride(0) * cache.itemsize
        if self.blocks > 1 and self.stride < self.size_bytes:
            raise ConfigError(f"pages of {self.size_bytes} bytes overlap: they begin {self.stride} bytes apart")


def _word_of(pages: Sequence[_Page]) -> tuple[int, torch.dtype]:
    places = [place for page in pages for place in (page.at, page.stride, page.size_bytes, page.storage.data_ptr())]
    return next((size, dtype) for size, dtype in _WORDS if not any(place % size for place in places))


def _runs(pages: Sequence[_Page]) -> list[list[_Page]]:
    """The layers, as few runs of them as there are of even distance in one storage."""
    runs = [[pages[0]]]
    for before, page in pairwise(pages):
        run = runs[-1]
        ahead = page.at - before.at
        is_near = page.storage.data_ptr() == before.storage.data_ptr() and page.stride == before.stride and ahead > 0
        if is_near and (len(run) == 1 or ahead == run[1].at - run[0].at):
            run.append(page)
        else:
            runs.append([page])
    return runs
