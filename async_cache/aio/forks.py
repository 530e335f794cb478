"""Whether a process was forked since something was made, asked without a system call."""

import os


class Process:
    """A process, from its start or its fork on."""

    __slots__ = ()


_here = Process()


def _begin() -> None:
    global _here
    _here = Process()


os.register_at_fork(after_in_child=_begin)


def process() -> Process:
    """The process that asks: another one in a forked child than in its parent."""
    return _here
