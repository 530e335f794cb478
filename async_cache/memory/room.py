"""How much memory there is for an arena: on the machine, and in the control groups that this process is in."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from async_cache.errors import ConfigError

_LIMITS = {
    "cgroup2": ("memory.max", "memory.high"),
    "cgroup": ("memory.limit_in_bytes",),
}
_USE = {"cgroup2": "memory.current", "cgroup": "memory.usage_in_bytes"}
_FILE_PAGES = {"cgroup2": ("active_file", "inactive_file"), "cgroup": ("total_active_file", "total_inactive_file")}
"""Lines of memory.stat: pages of files, which the kernel drops for others. Shared memory is not among them."""


class Room(NamedTuple):
    """A bound on memory: `limit_bytes` in all, of which `free_bytes` can be had now; `where` names it."""

    where: str
    limit_bytes: int
    free_bytes: int


def rooms(root: Path = Path("/")) -> Iterator[Room]:
    """All bounds on what this process may take, as far as the system tells. Swap is none: L2 is faster.

    `root` is where `/proc` and the mounts of control groups are.
    """
    memory = _numbers(root / "proc/meminfo")
    if {"MemTotal:", "MemAvailable:"} <= memory.keys():
        yield Room("the machine", memory["MemTotal:"] * 1024, memory["MemAvailable:"] * 1024)
    for kind, group, top in _groups(root):
        while True:
            yield from _rooms_of(kind, group, root)
            if group == top:
                break
            group = group.parent


def check_limits(size_bytes: int) -> None:
    """Raises ConfigError if this process can never have so much memory, however little others use."""
    for room in rooms():
        if size_bytes > room.limit_bytes:
            raise ConfigError(
                f"l1_bytes: {_mebibytes(size_bytes)} is more than {room.where} has, {_mebibytes(room.limit_bytes)}"
            )


def check_free(size_bytes: int) -> None:
    """Raises ConfigError if so much memory cannot be had now: whoever takes it all the same is killed."""
    for room in rooms():
        if size_bytes > room.free_bytes:
            raise ConfigError(
                f"l1_bytes: {_mebibytes(size_bytes)} cannot be had, {room.where} has {_mebibytes(room.free_bytes)} free"
                f" of {_mebibytes(room.limit_bytes)}"
            )


def _groups(root: Path) -> Iterator[tuple[str, Path, Path]]:
    """The kind of each hierarchy of control groups that bounds memory, the folder of this process's group, and the top.

    In a container the folders may begin at the group of the container itself, or be absent.
    """
    paths: dict[str, PurePosixPath] = {}
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0" or "memory" in controllers.split(","):
            paths["cgroup2" if number == "0" else "cgroup"] = PurePosixPath(path)
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, system = line.partition(" - ")
        kind, _, options = system.split(" ", 2)
        if kind not in paths or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        begins, where = (PurePosixPath(field) for field in mount.split(" ")[3:5])
        top = root / where.relative_to("/")
        own = paths[kind]
        inside = own.relative_to(begins) if own.is_relative_to(begins) else PurePosixPath()
        group = top / inside
        yield kind, group if ".." not in inside.parts and group.is_dir() else top, top


def _rooms_of(kind: str, group: Path, root: Path) -> Iterator[Room]:
    used = _number(group / _USE[kind])
    if used is None:
        return
    stat = _numbers(group / "memory.stat")
    used = max(used - sum(stat.get(name, 0) for name in _FILE_PAGES[kind]), 0)
    for name in _LIMITS[kind]:
        limit = _number(group / name)
        if limit is not None:
            where = f"{name} of the control group /{group.relative_to(root)}"
            yield Room(where, limit, max(limit - used, 0))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """What a file of one number says; None where there is none, or a word such as "max"."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdecimal() else None


def _numbers(path: Path) -> dict[str, int]:
    """The second word of each line by its first."""
    words = (line.split() for line in _lines(path))
    return {first: int(second) for first, second, *_ in words if second.isdecimal()}


def _mebibytes(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"
