"""What a GPU's edge does on a GPU: what can be pinned, whether all bytes are right, how fast, and what it costs others.

    python benchmarks/gpu [--rehearse] [STEP ...]

Steps: facts pins pinning checks bandwidth beside. Needs torch and the core dependencies, nothing else. After each step
what is known so far is written to $OUT/gpu.json (or ./gpu.json). With --rehearse all of it runs on a CPU, at sizes that
measure nothing, with what the tests have in place of `torch.cuda`.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from gpu import bandwidth, beside, checks, pinning  # noqa: E402
from gpu.machine import Machine, facts  # noqa: E402

STEPS: dict[str, Callable[[Machine], Any]] = {
    "facts": facts,
    "pins": pinning.matrix,
    "pinning": pinning.seconds,
    "checks": checks.run,
    "bandwidth": bandwidth.measure,
    "beside": beside.measure,
}


def main() -> int:
    rehearsal = "--rehearse" in sys.argv
    steps = [name for name in sys.argv[1:] if name in STEPS] or list(STEPS)
    machine = Machine.rehearsed() if rehearsal else Machine.found()
    if machine is None:
        print("there is no CUDA here: nothing was run, and nothing is known")
        return 0
    path, told, failed = Path(os.environ.get("OUT", ".")) / "gpu.json", {"rehearsal": rehearsal}, False
    for name in steps:
        began = time.perf_counter()
        try:
            result = STEPS[name](machine)
        except Exception as error:  # the next step may say more
            result, failed = {"error": f"{type(error).__name__}: {error}"}, True
        failed = failed or (name == "checks" and bool(result.get("failed")))
        told[name] = result | {"seconds": round(time.perf_counter() - began, 1)}
        path.write_text(json.dumps(told, indent=1))
        print(name, json.dumps(told[name]), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
