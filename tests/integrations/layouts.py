"""Paged KV as engines arrange it: the same pages (blocks, heads, tokens, numbers) of each layer, in many orders."""

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch

from async_cache.prompt.objects import ObjectGroup

LAYERS, BLOCKS, HEADS = 3, 9, 2


@dataclass(frozen=True)
class Arrangement:
    """`order`: the physical order of Layers, Blocks, Heads, tokeNs and Contents; "" for a tensor for each layer."""

    order: str = "LBHNC"
    dtype: torch.dtype = torch.bfloat16
    heads: int = HEADS
    tokens: int = 16
    contents: int = 24
    padding: int = 0  # numbers behind each page

    def caches(self, device: str = "cpu", *, filled: bool = True, blocks: int = BLOCKS) -> list[torch.Tensor]:
        """By layer, views (blocks, heads, tokens, contents) of new memory."""
        if not self.order or self.padding:
            return list(self._apart(device, filled=filled, blocks=blocks))
        sizes = {"L": LAYERS, "B": blocks, "H": self.heads, "N": self.tokens, "C": self.contents}
        whole = _memory(prod(sizes.values()), self.dtype, device, filled=filled)
        laid = whole.view([sizes[axis] for axis in self.order])
        return list(laid.permute([self.order.index(axis) for axis in "LBHNC"]))

    def _apart(self, device: str, *, filled: bool, blocks: int) -> Iterator[torch.Tensor]:
        page = self.heads * self.tokens * self.contents
        size = blocks * (page + self.padding)
        whole = _memory(LAYERS * size, self.dtype, device, filled=filled)
        strides = (page + self.padding, self.tokens * self.contents, self.contents, 1)
        for layer in range(LAYERS):
            own = whole[layer * size : (layer + 1) * size]
            memory = own if self.order else own.clone()
            yield memory.as_strided((blocks, self.heads, self.tokens, self.contents), strides, memory.storage_offset())

    def group(self, blocks: int = 4) -> ObjectGroup:
        """Objects of so many blocks."""
        page = self.heads * self.tokens * self.contents * self.dtype.itemsize
        return ObjectGroup((LAYERS, blocks, page), "uint8")


def _memory(count: int, dtype: torch.dtype, device: str, *, filled: bool) -> torch.Tensor:
    size = count * dtype.itemsize
    made = torch.randint(0, 255, (size,), dtype=torch.uint8) if filled else torch.zeros(size, dtype=torch.uint8)
    return made.to(device).view(dtype)


ARRANGEMENTS = {
    "a tensor for each layer": Arrangement(""),
    "LBHNC": Arrangement("LBHNC"),
    "LBNHC": Arrangement("LBNHC"),
    "BLHNC": Arrangement("BLHNC"),
    "BLNHC": Arrangement("BLNHC"),
    "padded": Arrangement(padding=40),
    "padded, apart": Arrangement("", padding=8),
    "fp16": Arrangement(dtype=torch.float16),
    "fp8": Arrangement("BLNHC", dtype=torch.float8_e4m3fn),
    "latent": Arrangement("BLHNC", heads=1, contents=576),
    "latent with scales": Arrangement(dtype=torch.uint8, heads=1, contents=656),
    "odd bytes": Arrangement(dtype=torch.uint8, heads=1, tokens=1, contents=13),
    "odd padding": Arrangement(dtype=torch.uint8, contents=8, padding=3),
    **{f"{tokens} tokens": Arrangement(tokens=tokens) for tokens in (32, 64, 128)},
}
REFUSED = {"LHBNC": Arrangement("LHBNC"), "BHLNC": Arrangement("BHLNC")}
"""Those in which another layer, or other blocks, lie inside a page."""


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The bytes of a contiguous tensor in the host's memory."""
    assert tensor.is_contiguous() and not tensor.is_cuda
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


def raw(cache: torch.Tensor, block: int) -> bytes:
    """The bytes of a page as they lie in memory: a page begins where its first number is, and has no holes."""
    page = cache[block]
    memory = torch.empty(0, dtype=torch.uint8, device=cache.device).set_(cache.untyped_storage())
    begin = page.storage_offset() * page.itemsize
    return bytes_of(memory[begin : begin + page.nbytes].cpu())


def object_of(caches: Sequence[torch.Tensor], blocks: Sequence[int]) -> bytes:
    """What an object of these blocks has to be."""
    return b"".join(raw(cache, block) for cache in caches for block in blocks)
