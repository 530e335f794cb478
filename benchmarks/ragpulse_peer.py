"""LMCache's blend matcher for `ragpulse.py`: a process of its own, in its own Python, which needs LMCache alone.

Arguments: the trace, tokens of a chunk, and how many requests. It does what LMCache 0.5.6's blend server does around
its matcher (`v1/multiprocess/modules/blend`): of a prompt, the leading chunks that are stored by their chained hashes;
then, anywhere behind those, windows with the fingerprint of a stored chunk, the earlier of two that overlap. All whole
chunks are stored after each request, and all but the first of a prompt get a fingerprint. Nothing else of the server
runs, so the time is that of hashing and matching. Prints one line of JSON.
"""

import gzip
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from functools import cache
from itertools import islice
from typing import NamedTuple

VOCABULARY = 128_000


class Part(NamedTuple):
    """What stands in a prompt: of which kind, and which text."""

    kind: str
    name: int
    tokens: int


def read(path: str, count: int | None) -> Iterator[list[Part]]:
    """The parts of each request of RAGPulse, in the order of their prompt."""
    with gzip.open(path, "rt") as lines:
        for line in islice(lines, count):
            yield [Part(*part) for part in json.loads(line)["parts"]]


@cache
def ids(part: Part) -> list[int]:
    """Token ids, made up: the same for the same text."""
    return random.Random(part.name).choices(range(VOCABULARY), k=part.tokens)


def main(path: str, chunk_tokens: int, count: int) -> None:
    from lmcache.v1.multiprocess.modules.blend.matcher import BlendTokenRangeMatcher
    from lmcache.v1.multiprocess.token_hasher import TokenHasher

    hasher, matcher = TokenHasher(chunk_tokens), BlendTokenRangeMatcher(chunk_tokens)
    for _ in range(2):  # compiles what it calls
        matcher.on_new_token_hashes([0] * 2 * chunk_tokens, [b"0", b"1"])
        matcher.match_sub_sequence([0] * 2 * chunk_tokens)
    matcher = BlendTokenRangeMatcher(chunk_tokens)
    stored: set[bytes] = set()
    found, seconds = 0, []
    for parts in read(path, count):
        tokens = [token for part in parts for token in ids(part)]
        began = time.thread_time()
        hashes = [hasher.hash_to_bytes(chunk_hash) for chunk_hash in hasher.compute_chunk_hashes(tokens)]
        prefix = next((number for number, name in enumerate(hashes) if name not in stored), len(hashes))
        end = prefix * chunk_tokens
        matches = matcher.match_sub_sequence(tokens)
        kept = 0
        for match in sorted(matches, key=lambda match: match.cur_st):
            if match.cur_st >= end:
                kept, end = kept + 1, match.cur_ed
        seconds.append(time.thread_time() - began)
        found += (prefix + kept) * chunk_tokens
        stored.update(hashes)
        matcher.on_new_token_hashes(
            tokens[prefix * chunk_tokens :], hashes[prefix:], max(1 - prefix, 0), prefix * chunk_tokens
        )
    print(json.dumps((found, len(stored) * chunk_tokens, statistics.median(seconds))))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
