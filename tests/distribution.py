"""A little distribution, as if somebody had installed it: a module, and metadata with entry points."""

from pathlib import Path

from async_cache.l2.urls.registry import GROUP

BACKEND = """\
from async_cache.l2 import BackendURL
from async_cache.l2.memory import MemoryBackend


def make(url: BackendURL) -> MemoryBackend:
    return MemoryBackend(f"remote {url.hostname}:{url.port}{url.path}", **url.parameters(capacity_bytes=int))
"""
"""A module with a backend that has a host."""


def install(folder: Path, name: str, source: str | None = BACKEND, **schemes: str) -> None:
    """Put version 1.5 of a distribution, its one module of the same name, and its schemes, into a folder."""
    if source is not None:
        (folder / f"{name}.py").write_text(source)
    info = folder / f"{name}-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
    lines = [f"[{GROUP}]", *(f"{scheme} = {value}" for scheme, value in schemes.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
