"""Whether a process was forked since something was made, asked without a system call.

And what its children are not to hold.
"""

import os
import weakref
from collections.abc import Sequence
from typing import Protocol


class Process:
    """A process, from its start or its fork on."""

    __slots__ = ()


class Holder(Protocol):
    """Has descriptors that mean something to other processes: locks, connections, ports."""

    def descriptors(self) -> Sequence[int]:
        """Those that are open now; -1 is none."""


_here = Process()
_holders: "weakref.WeakSet[Holder]" = weakref.WeakSet()


def _begin() -> None:
    global _here
    _here = Process()
    descriptors = [descriptor for holder in _holders for descriptor in holder.descriptors() if descriptor >= 0]
    if descriptors:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for descriptor in descriptors:
            os.dup2(null, descriptor, inheritable=False)  # the number stays taken: who closes it closes nothing else
        os.close(null)


os.register_at_fork(after_in_child=_begin)


def process() -> Process:
    """The process that asks: another one in a forked child than in its parent."""
    return _here


def keep_from_children(holder: Holder) -> None:
    """Have no forked child hold the descriptors of this one, as long as it is there.

    A child shares what its parent has open: a lock or a connection would outlive the parent in it.
    """
    _holders.add(holder)
