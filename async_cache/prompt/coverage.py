"""Found objects (rank x group x chunk) -> the lengths of the prefix that they can serve. Pure.

A prefix of n chunks can be served if every chunk in it has its full-attention objects, and the last w chunks have the
objects of each group with a window of w. What lies before the first chunk counts as present: the engine holds it.
"""

from bisect import bisect_right
from collections.abc import Sequence

from async_cache.prompt.layout import ModelLayout


def lengths(layout: ModelLayout, found: Sequence[int]) -> Sequence[int]:
    """All lengths that can be served, ascending, 0 included. `found`: the objects of each chunk, as masks."""
    need = layout.objects.prefix_mask
    limit = len(found)
    if found.count(need) < limit:
        limit = next((i for i, have in enumerate(found) if have & need != need), limit)
    if not layout.objects.windows:
        return range(limit + 1)
    runs = [0] * len(layout.objects.windows)  # how many chunks up to here have the window's objects without a gap
    served = [0]
    for n in range(1, limit + 1):
        fits = True
        for k, (window, mask) in enumerate(layout.objects.windows):
            runs[k] = runs[k] + 1 if found[n - 1] & mask == mask else 0
            fits = fits and runs[k] >= min(window, n)
        if fits:
            served.append(n)
    return served


def largest(served: Sequence[int], at_most: int) -> int:
    """The largest length in `served` that is not above `at_most`."""
    return served[bisect_right(served, at_most) - 1]


def needed(layout: ModelLayout, length: int) -> Sequence[int]:
    """The objects that a prefix of `length` chunks needs, as a mask for each chunk."""
    masks = [layout.objects.prefix_mask] * length
    for window, mask in layout.objects.windows:
        for i in range(max(0, length - window), length):
            masks[i] |= mask
    return masks
