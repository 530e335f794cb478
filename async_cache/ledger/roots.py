"""Under which roots there are chunks: where the same tokens may be cached as something else."""

from collections import Counter, OrderedDict
from collections.abc import Iterator

from msgspec import Struct

from async_cache.prompt.layout import ModelLayout, Prompt

MOST_ROOTS = 1024


class Root(Struct, frozen=True, eq=False):
    """What a chain of chunk hashes starts from, as far as it is not the tokens."""

    digest: bytes
    layout: ModelLayout
    adapter: str
    salt: str


class Roots:
    """The roots of the prompts that were stored or loaded of late, at most so many.

    Where there are too many, the salt that has most of them loses its oldest one: no tenant makes those of others go.
    """

    def __init__(self, most: int = MOST_ROOTS) -> None:
        self._roots: OrderedDict[bytes, Root] = OrderedDict()
        self._most = most
        self._of_salt: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Root]:
        """The newest one first."""
        return iter(list(reversed(self._roots.values())))

    def note(self, prompt: Prompt) -> None:
        """Know the root of a prompt, as the newest one."""
        roots, digest = self._roots, prompt.root
        if digest in roots:
            roots.move_to_end(digest)
            return
        roots[digest] = Root(digest, prompt.layout, prompt.adapter, prompt.salt)
        self._of_salt[prompt.salt] += 1
        if len(roots) > self._most:
            (salt, _), *_ = self._of_salt.most_common(1)
            oldest = next(root for root in roots.values() if root.salt == salt)
            del roots[oldest.digest]
            self._of_salt[salt] -= 1
            if not self._of_salt[salt]:
                del self._of_salt[salt]

    def beside(self, prompt: Prompt) -> list[Root]:
        """Other roots of the same model and salt, the newest first: nothing is told of another salt."""
        model = prompt.layout.model
        return [
            root
            for root in reversed(self._roots.values())
            if root.digest != prompt.root and root.salt == prompt.salt and root.layout.model == model
        ]


def differences(ours: Prompt, theirs: Root) -> tuple[str, ...]:
    """In what two roots of one model differ, by the names of the fields."""
    here, there = ours.layout, theirs.layout
    names = [name for name in ("revision", "chunk_tokens", "world_size") if getattr(here, name) != getattr(there, name)]
    if ours.adapter != theirs.adapter:
        names.append("adapter")
    if len(here.groups) != len(there.groups):
        return (*names, "groups")
    for name in ("dtype", "shape", "window_chunks", "ranks"):
        if any(getattr(a, name) != getattr(b, name) for a, b in zip(here.groups, there.groups, strict=True)):
            names.append(name)
    return tuple(names)
