"""When the hits are known and when the bytes are in memory, timed inside the loop: `python benchmarks/hits.py [MiB]`.

Objects lie in a directory and in the page cache, none in L1. Prints medians in microseconds as JSON, one row for each
number of objects. `known_us`: lookups, one after the other. `between_us`: lookups between loads, which leave the caches
of the processor cold.
"""

import json
import statistics
import sys

from system_ours import Ours

COUNTS = (16, 64, 256)
ROUNDS = 24


def main(size):
    ours = Ours("fs")
    ours.open(2 * max(COUNTS) * size, {})
    ours.populate(size, max(COUNTS))
    rows = []
    for count in COUNTS:
        seconds = ours.inside("l2", size, count, ROUNDS, max(COUNTS))
        columns = (ours.look_up(size, count, 4 * ROUNDS), seconds["known"], seconds["loaded"])
        known, between, loaded = (statistics.median(column) * 1e6 for column in columns)
        rows.append({"objects": count, "known_us": known, "between_us": between, "loaded_us": loaded})
    ours.close()
    print(json.dumps(rows))


if __name__ == "__main__":
    main(int(float(sys.argv[1]) * 2**20) if len(sys.argv) > 1 else 2**20)
