"""How much memory there is: of the machine, and of control groups of both kinds, in containers and without."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from async_cache.errors import ConfigError
from async_cache.memory import room
from async_cache.memory.room import Room, check_free, check_limits, rooms

MEMINFO = "MemTotal:       16 kB\nMemFree:         1 kB\nMemAvailable:    8 kB\nHugePages_Total:       0\n"
MACHINE = Room("the machine", 16384, 8192)
V2 = "35 24 0:30 {root} /cg rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "36 24 0:31 {root} /cg rw - cgroup cgroup rw,memory\n37 24 0:32 {root} /cpu rw - cgroup cgroup rw,cpu\n"


def make(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_without_control_groups_there_is_what_the_machine_has(tmp_path: Path) -> None:
    assert list(rooms(make(tmp_path, {"proc/meminfo": MEMINFO}))) == [MACHINE]


def test_where_the_system_tells_nothing_nothing_is_refused(tmp_path: Path) -> None:
    assert list(rooms(tmp_path)) == []


def test_all_groups_of_version_2_bound_it_by_both_limits(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        "proc/self/mountinfo": V2.format(root="/"),
        "cg/a/b/memory.max": "max\n",
        "cg/a/b/memory.high": "9000\n",
        "cg/a/b/memory.current": "1000\n",
        "cg/a/b/memory.stat": "anon 400\nfile 600\nshmem 100\nactive_file 200\ninactive_file 300\n",
        "cg/a/memory.max": "5000\n",
        "cg/a/memory.high": "max\n",
        "cg/a/memory.current": "6000\n",
        "cg/cgroup.procs": "",
    }
    assert list(rooms(make(tmp_path, files))) == [
        Room("memory.high of the control group /cg/a/b", 9000, 8500),
        Room("memory.max of the control group /cg/a", 5000, 0),
    ]


def test_all_groups_of_version_1_bound_it(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:cpu:/x\n4:hugetlb,memory:/a\n1:name=systemd:/\n",
        "proc/self/mountinfo": V1.format(root="/"),
        "cg/a/memory.limit_in_bytes": "9000\n",
        "cg/a/memory.usage_in_bytes": "1000\n",
        "cg/a/memory.stat": "active_file 1\ntotal_active_file 200\ntotal_inactive_file 300\n",
        "cg/memory.limit_in_bytes": "8000\n",
        "cg/memory.usage_in_bytes": "2000\n",
        "cpu/x/memory.limit_in_bytes": "1\n",
        "cpu/x/memory.usage_in_bytes": "1\n",
    }
    assert list(rooms(make(tmp_path, files))) == [
        Room("memory.limit_in_bytes of the control group /cg/a", 9000, 8500),
        Room("memory.limit_in_bytes of the control group /cg", 8000, 6000),
    ]


@pytest.mark.parametrize(
    ("own", "root"),
    [("/docker/1", "/docker/1"), ("/", "/"), ("/../..", "/"), ("/elsewhere", "/docker/1"), ("/not/there", "/")],
    ids=["mounted from its own group", "a namespace", "outside the namespace", "outside the mount", "no such folder"],
)
def test_in_a_container_the_top_of_the_mount_is_its_group(own: str, root: str, tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": f"0::{own}\n",
        "proc/self/mountinfo": V2.format(root=root),
        "cg/memory.max": "9000\n",
        "cg/memory.current": "1000\n",
    }
    assert list(rooms(make(tmp_path, files))) == [Room("memory.max of the control group /cg", 9000, 8000)]


def test_what_there_is_not_is_refused_with_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = [Room("the machine", 2**40, 2**39), Room("memory.max of the control group /cg", 2**34, 2**33)]
    monkeypatch.setattr(room, "rooms", lambda: iter(bounds))
    check_free(2**33)
    check_limits(2**34)
    with pytest.raises(ConfigError, match=r"^l1_bytes: 8,193 MiB cannot be had, memory.max of .* has 8,192 MiB free"):
        check_free(2**33 + 2**20)
    with pytest.raises(ConfigError, match=r"^l1_bytes: 16,385 MiB is more than memory.max of .* has, 16,384 MiB$"):
        check_limits(2**34 + 2**20)


def test_this_machine_has_some() -> None:
    machine, *_ = rooms()
    assert machine.where == "the machine"
    assert 0 < machine.free_bytes < machine.limit_bytes


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group of its own with 256 MiB, below a real one."""
    for top, limit in (("memory", "memory.limit_in_bytes"), (".", "memory.max")):
        made = Path("/sys/fs/cgroup", top, f"async_cache_test_{os.getpid()}")
        with suppress(OSError):
            made.mkdir()
            try:
                (made / limit).write_text(str(256 * 2**20))
                yield made
            finally:
                made.rmdir()
            return
    pytest.skip("no control group can be made here")


@pytest.mark.parametrize("l1_bytes", ["200MiB", "512MiB"])
def test_an_arena_that_the_control_group_cannot_give_is_refused_and_not_killed(
    l1_bytes: str, group: Path, tmp_path: Path
) -> None:
    program = f"""
import asyncio, sys
from async_cache import AsyncCache, CacheConfig, ConfigError
async def main():
    async with AsyncCache(CacheConfig(l1_bytes={l1_bytes[:-3]} * 2**20, l2=[])):
        print("open")
try:
    asyncio.run(main())
except ConfigError as error:
    print(error)
"""
    run = subprocess.run(
        ["/bin/sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', group, sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert (run.returncode, run.stderr) == (0, "")
    if l1_bytes == "200MiB":
        assert run.stdout == "open\n"
    else:
        assert run.stdout.startswith("l1_bytes: 512 MiB cannot be had, memory.")
        assert run.stdout.endswith(" MiB free of 256 MiB\n")
        assert group.name in run.stdout
