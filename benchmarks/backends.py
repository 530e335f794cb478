"""The backends beside what each of them stands on, in one run: `python benchmarks/backends.py [part ...]`.

The parts are `valkey`, `object_store`, `mooncake`, `codecs` and `tiers`: each is a program in `l2`, which starts what
it needs, lets everything that is compared take turns, and says at its top what is measured. Prints, in Markdown, what
each has measured, and then every number that was aimed at and whether it was reached. What could not be measured is
named with the reason.

    PEER_PYTHON=.../bin/python   a Python that has LMCache: its `resp` client takes its turns with Valkey's
    --kv FILE                    real KV for the codecs; else the demonstration's model computes it (`make demo`)
    --small                      sizes that measure nothing, to see that everything runs
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent / "l2"
PARTS = {name: HERE / f"{name}.py" for name in ("valkey", "object_store", "codecs", "tiers")}
PARTS["mooncake"] = HERE / "mooncake_tcp.py"
CHUNK_BYTES = 2 * 2 * 30 * 3 * 256 * 64  # of KV, for `codecs`
TWO = "ours, connections 2"  # the default

Rows = list[dict[str, Any]]
Number = Callable[[Rows], float]


class Aim(NamedTuple):
    """A number in the rows of a part, and what it is to be: at least `bound`, or at most."""

    part: str
    what: str
    number: Number
    bound: float
    at_most: bool = False

    def row(self, rows: Rows) -> tuple[str, ...]:
        try:
            number = self.number(rows)
        except LookupError as error:
            return (self.what, "", "", f"not measured: {error}")
        reached = number <= self.bound if self.at_most else number >= self.bound
        return (
            self.what,
            f"{number:.3g}",
            f"{'<=' if self.at_most else '>='} {self.bound}",
            "yes" if reached else "no",
        )


def of(field: str, **wanted: Any) -> Number:
    """A field of the first row that has these values."""

    def number(rows: Rows) -> float:
        found = next((row[field] for row in rows if wanted.items() <= row.items()), None)
        if found is None:
            raise LookupError(f"{field} of {' '.join(map(str, wanted.values()))}")
        return float(found)

    return number


def ratio(this: Number, that: Number) -> Number:
    return lambda rows: this(rows) / that(rows)


def minus(this: Number, that: Number) -> Number:
    return lambda rows: this(rows) - that(rows)


DEAD = ratio(of("p99_us", row="l1", valkey="dead"), of("p99_us", row="l1", valkey="none"))
DEAD_TIER = ratio(of("p99_us", cache="a dead one behind it"), of("p99_us", cache="one backend"))
HELD = minus(of("held_ms", backend="fs, codec=zstd"), of("held_ms", backend="fs, codec=none"))
LOADS = ("load 64 x 1 MiB", "load 16 x 8 MiB")
AIMS = [
    Aim("valkey", "load of 64 x 1 MiB, of the fastest bare client's speed", of("of_bare", row="load", system=TWO), 0.9),
    Aim("valkey", "the same, of LMCache's `resp`", of("of_peer", row="load", system=TWO), 1.5),
    Aim("valkey", "CPU of the client, ms a MiB", of("cpu_ms_per_mib", row="load", system=TWO), 0.25, True),
    Aim("valkey", "lookup of 256 keys, of a bare one's time", of("of_bare", row="lookup", system="ours"), 1.3, True),
    Aim("valkey", "hits in L1 beside a dead server, 99th percentile, of that without", DEAD, 1.1, True),
    *(
        Aim("object_store", f"{where}, {what}, of bare obstore's speed", of("of_bare", where=where, what=what), 0.9)
        for where in ("moto", "directory")
        for what in LOADS
    ),
    Aim("mooncake", "load of 64 x 1 MiB, of its own batch get's speed", of("of_bare", what="load of 64 x 1 MiB"), 0.9),
    Aim("codecs", "zstd, ratio", of("ratio", codec="zstd"), 1.46),
    Aim("codecs", "zstd: the loop stands still, ms more than without a codec", HELD, 5, True),
    Aim("tiers", "hits in L1, a dead tier behind the first, 99th percentile, of that without", DEAD_TIER, 1.1, True),
]


def table(head: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> None:
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(map(shown, row)) + " |", flush=True)


def shown(cell: Any) -> str:
    return "" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def run(part: str, kv: Path | None, *, small: bool) -> Rows:
    """What a part has measured. Raises CalledProcessError, with what it said."""
    arguments = [str(kv)] if part == "codecs" and kv is not None else []
    arguments += ["4"] if part == "tiers" and small else []
    environment = os.environ | ({"ROUNDS": "1" if part != "tiers" else "4"} if small else {})
    command = (sys.executable, PARTS[part], *arguments)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=1800)
    rows: Rows = json.loads(done.stdout)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="The backends beside what each of them stands on.")
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all, if none is named")
    parser.add_argument("--kv", type=Path, metavar="FILE", help="real KV for the codecs")
    parser.add_argument("--small", action="store_true", help="sizes that measure nothing")
    asked = parser.parse_args()
    if unknown := set(asked.parts) - set(PARTS):
        parser.error(f"no part is named {' or '.join(sorted(unknown))}")
    found: dict[str, Rows] = {}
    faults: dict[str, str] = {}
    with tempfile.NamedTemporaryFile() as noise:
        noise.write(os.urandom(CHUNK_BYTES))
        noise.flush()
        for part in asked.parts or PARTS:
            try:
                found[part] = run(part, Path(noise.name) if asked.small else asked.kv, small=asked.small)
            except subprocess.CalledProcessError as error:
                faults[part] = (error.stderr.strip().splitlines() or ["it said nothing"])[-1]
                continue
            print(f"\n## {part}")
            for head in dict.fromkeys(map(tuple, found[part])):
                table(head, [tuple(row.values()) for row in found[part] if tuple(row) == head])
    print("\n## What was aimed at")
    table(("", "figure", "aim", "reached"), [aim.row(found[aim.part]) for aim in AIMS if aim.part in found])
    for part, why in faults.items():
        print(f"\n{part} was not measured: {why}")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
