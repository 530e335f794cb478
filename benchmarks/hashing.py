"""How fast prompts are hashed: `python benchmarks/hashing.py`. Prints millions of tokens a second as JSON, medians."""

import json
import random
import statistics
import time
from array import array

from async_cache import ModelLayout, ObjectGroup

ROUNDS = 15


def main():
    layout = ModelLayout("hashing", (ObjectGroup((1,), "uint8"),), chunk_tokens=256)
    ids = [random.Random(1).randrange(128_000) for _ in range(131_072)]
    inputs = {"list of int": ids, "int32 buffer": array("i", ids), "int64 buffer": array("q", ids)}
    rows = []
    for kind, tokens in inputs.items():
        seconds = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            assert len(layout.prompt(tokens).chunk_hashes) == len(ids) // 256
            seconds.append(time.perf_counter() - began)
        rows.append({"input": kind, "mtokens_per_second": round(len(ids) / statistics.median(seconds) / 1e6, 1)})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
