"""Found objects (rank x group x chunk) -> the lengths of the prefix that they can serve. Pure.

A prefix of n chunks can be served if every chunk in it has its full-attention objects, and the last w chunks have the
objects of each group with a window of w. What lies before the first chunk counts as present: the engine holds it.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import islice

from async_cache.prompt.layout import ModelLayout
from async_cache.prompt.parts import Run

_AT_A_TIME = 1024  # chunks that are compared in one go


def lengths(layout: ModelLayout, found: Sequence[int]) -> Sequence[int]:
    """All lengths that can be served, ascending, 0 included. `found`: the objects of each chunk, as masks."""
    need = layout.objects.prefix_mask
    limit = len(found)
    if found.count(need) < limit:
        limit = _first_lacking(found, need)
    if not layout.objects.windows:
        return range(limit + 1)
    all_windows = layout.objects.reaching[0][1]
    served = [0]
    blocked = 0  # what lacks something may be behind the windows of lengths beyond this
    for n, have in enumerate(islice(found, limit)):
        if lacks := all_windows & ~have:
            blocked = max(blocked, n + _reach(layout.objects.reaching, lacks))
        if n + 1 > blocked:
            served.append(n + 1)
    return served


def _first_lacking(found: Sequence[int], need: int) -> int:
    """The first chunk that lacks some of what is needed, or how many there are: most lack nothing, and have no more."""
    for begin in range(0, len(found), _AT_A_TIME):
        part = found[begin : begin + _AT_A_TIME]
        if part.count(need) < len(part):
            for number, have in enumerate(part, begin):
                if have & need != need:
                    return number
    return len(found)


def _reach(reaching: Sequence[tuple[int, int]], lacks: int) -> int:
    """The longest window of the groups of which objects are lacking."""
    first_that_has_none = bisect_left(reaching, True, key=lambda pair: not pair[1] & lacks)
    return reaching[first_that_has_none - 1][0]


def largest(served: Sequence[int], at_most: int) -> int:
    """The largest length in `served` that is not above `at_most`."""
    return served[bisect_right(served, at_most) - 1]


def needed(layout: ModelLayout, length: int) -> Sequence[int]:
    """The objects that a prefix of `length` chunks needs, as a mask for each chunk."""
    if not length:
        return ()
    masks = [layout.objects.prefix_mask] * length
    before = 0  # chunks at the end that have what shorter windows need
    for window, mask in layout.objects.reaching:
        for i in range(max(0, length - window), length - before):
            masks[i] |= mask
        before = max(before, min(window, length))
    return masks


# Several prompts that are asked for together: a prefix of each run can be served, whatever is served of the others.


def run_of(run: Run, found: Sequence[int]) -> Sequence[int]:
    """What was found of the chunks of a run, of which only the first may have been looked for."""
    if isinstance(run, range):
        return found if not run.start and run.stop >= len(found) else found[run.start : run.stop]
    return [found[number] for number in run if number < len(found)]


def before(run: Run, number: int) -> int:
    """How many chunks of a run come before one with this number, or a greater one."""
    if isinstance(run, range):
        return min(max(number - run.start, 0), len(run))
    return next((at for at, other in enumerate(run) if other >= number), len(run))


def needed_of(layout: ModelLayout, runs: Sequence[Run], lengths: Sequence[int]) -> Sequence[int]:
    """The objects that prefixes of these lengths need of all chunks, as masks by their number."""
    if len(runs) == 1:
        return needed(layout, lengths[0])
    masks, shared = [0] * _end(runs, lengths), []
    for run, length in zip(runs, lengths, strict=True):
        if isinstance(run, range):
            masks[run.start : run.start + length] = needed(layout, length)
        else:
            shared.append((run, length))
    for run, length in shared:
        for number, mask in zip(run, needed(layout, length), strict=False):
            masks[number] |= mask
    return masks


def covered(runs: Sequence[Run], lengths: Sequence[int]) -> Sequence[int]:
    """1 for each chunk within a prefix of one of these lengths, by its number, and 0 for the others."""
    if len(runs) == 1:
        return [1] * lengths[0]
    marks = [0] * _end(runs, lengths)
    for number in numbers_of(runs, lengths):
        marks[number] = 1
    return marks


def numbers_of(runs: Sequence[Run], lengths: Sequence[int]) -> Iterable[int]:
    """The numbers of the chunks of all prefixes, in the order of the runs."""
    for run, length in zip(runs, lengths, strict=True):
        yield from run[:length]


def _end(runs: Sequence[Run], lengths: Sequence[int]) -> int:
    """Behind the last number of all prefixes."""
    ends = (
        run.start + length if isinstance(run, range) else max(run[:length]) + 1
        for run, length in zip(runs, lengths, strict=True)
        if length
    )
    return max(ends, default=0)
