"""`async-cache doctor`: whether a machine and its settings can do what they should, and what to change."""

import errno
import os
import platform
import re
import resource
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import typer
from msgspec import Struct
from rich.text import Text

from async_cache.cli.serving import L2, ConfigFile, L1Bytes, Listen, given
from async_cache.cli.terminal import Json, console, directory_of, grid, print_json, show_bytes
from async_cache.config import CacheConfig, ServerConfig, hide_password, http_address
from async_cache.errors import AsyncCacheError
from async_cache.l2.urls.registry import from_url
from async_cache.memory.room import check_limits
from async_cache.protocol.address import Address
from async_cache.server.listener import Listener

_DESCRIPTORS = 4096
_TAKEN = "already"  # in what is said of an address where somebody listens
_MOUNTS = Path("/proc/mounts")
_ESCAPED = re.compile(rb"\\([0-3][0-7][0-7])")  # what would part the fields, such as a space in a path
_NETWORKED = ("nfs", "nfs4", "cifs", "lustre", "ceph", "fuse.sshfs", "9p")
_PACKAGES = ("uvloop", "msgspec", "blake3", "xxhash", "torch", "obstore")
_MARKS = {"ok": ("ok", "green"), "look": ("look", "yellow"), "bad": ("bad", "bold red")}


class Finding(Struct, frozen=True):
    """What was looked at, how it is (ok, look, bad), what was found, and what to change."""

    about: str
    state: str
    found: str
    change: str = ""


def doctor(
    config: ConfigFile = None,
    listen: Listen = None,
    l1_bytes: L1Bytes = None,
    l2: L2 = None,
    json: Json = False,
) -> None:
    """Look whether this machine can do what the settings want: memory, limits, disks, sockets; say what to change.

    It takes the flags of `serve`. The exit code is 1 where something would not work.
    """
    cache_given, server_given = given(config, listen, l1_bytes, l2)
    cache_config, server_config = CacheConfig.of(cache_given), ServerConfig.of(server_given)
    if not show(list(examine(cache_config, server_config)), json=json):
        raise typer.Exit(1)


def examine(cache: CacheConfig, server: ServerConfig) -> Iterator[Finding]:
    """Look at everything. Nothing is changed, and no backend opened."""
    yield from _system()
    yield from _memory(cache)
    yield from _limits(server)
    for url in cache.l2:
        yield from _backend(url)
    yield from _addresses(server)
    yield from _packages()


def _system() -> Iterator[Finding]:
    it = os.uname()
    linux = it.sysname == "Linux"
    found = f"{it.sysname} {it.release}, Python {platform.python_version()}"
    yield Finding("system", "ok" if linux else "bad", found, "" if linux else "It runs on Linux.")


def _memory(cache: CacheConfig) -> Iterator[Finding]:
    wanted = show_bytes(cache.l1_bytes)
    try:
        check_limits(cache.l1_bytes)
    except AsyncCacheError as error:
        yield Finding("memory", "bad", str(error), "Make l1_bytes smaller, or the limit of the control group larger.")
    else:
        yield Finding("memory", "ok", f"{wanted} for L1 fit into what is free")
    swap = _number("/proc/meminfo", "SwapTotal") or 0
    swappiness = _number("/proc/sys/vm/swappiness", "") or 0
    if swap and swappiness > 10:
        yield Finding(
            "swap",
            "look",
            f"{show_bytes(swap * 1024)}, swappiness {swappiness}",
            "sysctl vm.swappiness=1: L1 that is swapped out is slower than L2.",
        )
    else:
        yield Finding("swap", "ok", "none is in the way")


def _number(path: str, name: str) -> int | None:
    """The number behind a name in a file of /proc, or the first one."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    line = next((line for line in lines if line.startswith(name)), "0")
    return int(next((word for word in line.split() if word.isdigit()), "0"))


def _limits(server: ServerConfig) -> Iterator[Finding]:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * server.max_connections + _DESCRIPTORS // 16
    enough = most == resource.RLIM_INFINITY or most >= wanted
    found = f"{most:,} may be open; {server.max_connections:,} connections take two each"
    change = "" if enough else f"LimitNOFILE={wanted} in the unit, or ulimit -Hn; or fewer max_connections."
    yield Finding("descriptors", "ok" if enough else "look", found, change)


def _backend(url: str) -> Iterator[Finding]:
    parts = urlsplit(url)
    try:
        from_url(url)
    except AsyncCacheError as error:
        yield Finding(hide_password(url), "bad", hide_password(str(error)), "Write it as docs/configuration.md says.")
        return
    path = directory_of(url)
    if path is None:
        if parts.hostname and parts.port:
            yield _reachable(parts.scheme, parts.hostname, parts.port)
        return
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    name = f"fs://{path}"
    if not there.is_dir():
        yield Finding(name, "bad", f"{there} is no directory", "Name one, or one that can be made.")
        return
    try:
        directly = _reads_past_the_page_cache(there)
    except OSError as error:
        owned = error.errno in (errno.EACCES, errno.EPERM)
        change = f"chown it to the user {os.getuid()}, or name another one." if owned else "Name another one."
        yield Finding(name, "bad", f"{there} cannot be written to: {error.strerror}", change)
        return
    kind, options = _mount(there)
    if kind in _NETWORKED:
        yield Finding(name, "look", f"{there} is on {kind}, shared by machines", "docs/deployment.md says what to set.")
    elif kind == "tmpfs":
        yield Finding(name, "look", f"{there} is memory (tmpfs)", "L1 is memory already: put it on a disk.")
    else:
        yield Finding(name, "ok", f"{there} is on {kind}{', noatime' if 'noatime' in options else ''}")
    capacity = dict(part.partition("=")[::2] for part in parts.query.split("&")).get("capacity", "10GiB")
    free = shutil.disk_usage(there).free
    if capacity != "none" and not path.exists():
        wanted = msgspec.convert(CacheConfig.parse("l1_bytes", capacity), int)
        if wanted > free:
            yield Finding(
                name, "bad", f"{show_bytes(free)} are free, and capacity is {capacity}", "Make capacity smaller."
            )
    if "direct=true" in parts.query and not directly:
        yield Finding(name, "bad", f"{kind} cannot read past the page cache", "Leave direct=true out.")


def _reads_past_the_page_cache(directory: Path) -> bool:
    """Whether files of a directory can be read with O_DIRECT. Raises OSError where none can be made."""
    with tempfile.TemporaryFile(dir=directory) as file:
        try:
            os.close(os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY | os.O_DIRECT))
        except OSError:
            return False
    return True


def _reachable(scheme: str, host: str, port: int) -> Finding:
    name = f"{scheme}://{host}:{port}"
    try:
        with socket.create_connection((host, port), timeout=2):
            return Finding(name, "ok", "somebody listens there")
    except OSError as error:
        return Finding(name, "bad", f"cannot be reached: {error}", "Start it, or look at the network between.")


def _byte(escaped: re.Match[bytes]) -> bytes:
    return bytes((int(escaped[1], 8),))


def _mount(path: Path) -> tuple[str, str]:
    """The kind of file system that a path is on, and its options."""
    real, best = str(path.resolve()), ("", "unknown", "")
    for line in _MOUNTS.read_bytes().splitlines():
        _, where, kind, options, *_ = (os.fsdecode(_ESCAPED.sub(_byte, word)) for word in line.split())
        inside = real == where or real.startswith(where.rstrip("/") + "/")
        if inside and len(where) >= len(best[0]):
            best = (where, kind, options)
    return best[1], best[2]


def _addresses(server: ServerConfig) -> Iterator[Finding]:
    addresses: Mapping[str, Address] = {url: Address.parse(url) for url in server.listen}
    if server.http:
        addresses = {**addresses, f"http://{server.http}": http_address(server.http)}
    for name, address in addresses.items():
        try:
            Listener(address).close()
        except AsyncCacheError as error:
            if _TAKEN in str(error):
                yield Finding(name, "look", str(error), "A server may be running already: async-cache ping.")
            else:  # without HTTP, a server serves all the same
                yield Finding(name, "bad" if name in server.listen else "look", str(error), "Take another one.")
        else:
            yield Finding(name, "ok", "is free")
    if address_of_tmp := next((a.path for a in addresses.values() if a.path.startswith(tempfile.gettempdir())), ""):
        change = "Set XDG_RUNTIME_DIR, or listen in /run: what sweeps /tmp may remove it."
        yield Finding("socket", "look", f"{address_of_tmp} is in the directory for temporary files", change)


def _packages() -> Iterator[Finding]:
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    yield Finding("packages", "ok", ", ".join(found))


def show(findings: list[Finding], *, json: bool) -> bool:
    """Print what was found; whether nothing is bad."""
    if json:
        print_json(findings)
    else:
        rows = grid(3)
        for it in findings:
            text = Text(it.found) if not it.change else Text.assemble(it.found, "\n", (f"-> {it.change}", "bold"))
            rows.add_row(Text(*_MARKS[it.state]), it.about, text)
        console.print(rows)
    return all(it.state != "bad" for it in findings)
