"""Several prompts that one request asks for: their chunks one behind the other, and each of them once.

Of each prompt, a prefix can be served, whatever is served of the others. Its chunks are a *run* of numbers, in its
order: those of prompts that begin alike have the same numbers.
"""

from collections.abc import Sequence
from itertools import accumulate, chain

from async_cache.prompt.layout import Prompt

MAX_PARTS = 256

Run = Sequence[int]
"""The numbers of a prompt's chunks, among all that a request asks for."""


class Parts:
    """What a request asks for that is more than one prompt; they have a layout and a salt in common.

    It has those members of a `Prompt` by which a request knows what it asks for. Chunks and tokens are counted as often
    as they stand in a prompt; `chunk_hashes` has each chunk once.
    """

    __slots__ = ("_firsts", "_runs", "chunks", "known_hashes", "layout", "parts", "salt", "tokens")

    def __init__(self, parts: tuple[Prompt, ...]):
        self.parts = parts
        self.layout, self.salt = parts[0].layout, parts[0].salt
        self.tokens = sum([prompt.tokens for prompt in parts])
        self.chunks = sum([prompt.chunks for prompt in parts])
        self.known_hashes: list[bytes] | None = None
        self._runs: tuple[Run, ...] = ()
        self._firsts: list[tuple[bytes | None, str]] = []
        if None not in [prompt.known_hashes for prompt in parts]:
            self.hash()

    @property
    def hashed(self) -> bool:
        """Whether `chunk_hashes` is known: if not, asking for it takes milliseconds."""
        return self.known_hashes is not None

    def hash(self) -> None:
        """Compute the chunk hashes, once; may run in any thread."""
        if self.known_hashes is not None:
            return
        parts = [prompt.chunk_hashes for prompt in self.parts]
        hashes = list(chain.from_iterable(parts))
        runs: list[Run] = []
        if len(set(hashes)) == len(hashes):  # nothing is in common, as most often
            ends = list(accumulate(map(len, parts), initial=0))
            runs += map(range, ends, ends[1:])
        else:
            numbers: dict[bytes, int] = {}
            for part in parts:
                first = len(numbers)
                run = [numbers.setdefault(chunk_hash, len(numbers)) for chunk_hash in part]
                runs.append(range(first, len(numbers)) if len(numbers) - first == len(run) else run)
            hashes = list(numbers)
        self._runs = tuple(runs)
        self.known_hashes = hashes

    @property
    def chunk_hashes(self) -> list[bytes]:
        """The 32-byte digest of each chunk, in the order of the parts."""
        if self.known_hashes is None:
            self.hash()
            assert self.known_hashes is not None
        return self.known_hashes

    @property
    def runs(self) -> tuple[Run, ...]:
        """The numbers of each part's chunks."""
        self.hash()
        return self._runs

    def before(self, number: int) -> bytes | None:
        """The hash of the chunk before one of these, in the first part that has it, if there is one."""
        return self._first(number)[0]

    def adapter_of(self, number: int) -> str:
        """The adapter of one of these chunks."""
        return self._first(number)[1]

    def _first(self, number: int) -> tuple[bytes | None, str]:
        """What lies before a chunk in the first part that has it, and the adapter of that."""
        if not self._firsts:
            firsts: dict[bytes, tuple[bytes | None, str]] = {}
            for prompt in self.parts:
                for before, chunk_hash in zip((None, *prompt.chunk_hashes), prompt.chunk_hashes, strict=False):
                    firsts.setdefault(chunk_hash, (before, prompt.adapter))
            self._firsts = list(firsts.values())
        return self._firsts[number]

    def __len__(self) -> int:
        return self.chunks

    def same_as(self, other: object) -> bool:
        """Whether both have the same parts, in the same order."""
        if not isinstance(other, Parts) or len(self.parts) != len(other.parts):
            return False
        return all(ours.same_as(theirs) for ours, theirs in zip(self.parts, other.parts, strict=True))

    def __repr__(self) -> str:
        return f"<Parts, {len(self.parts)} prompts of {self.tokens} tokens, model {self.layout.model!r}>"
