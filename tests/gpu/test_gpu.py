"""A GPU's edge on a GPU: held to the bytes of the pages, and to what a CPU makes of them. `make gpu` measures it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from gpu.checks import CASES  # noqa: E402
from gpu.machine import Machine  # noqa: E402

MACHINE = Machine.found()


@pytest.mark.skipif(MACHINE is None, reason="there is no CUDA here: nothing of a GPU's edge is run on one")
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name: str) -> None:
    assert MACHINE is not None
    CASES[name](MACHINE)


@pytest.mark.parametrize("name", CASES)
def test_in_a_rehearsal_on_a_cpu(name: str) -> None:
    CASES[name](Machine.rehearsed())


def test_all_that_is_measured_is_rehearsed_with_torch_and_the_core_dependencies_alone(tmp_path: Path) -> None:
    absent = ["numpy", "pytest", "hypothesis", "aiofiles", "prometheus_client", "starlette", "typer", "rich"]
    code = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({absent}));"
        f"sys.argv = ['gpu', '--rehearse']; runpy.run_path({str(BENCHMARKS / 'gpu')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], env={"OUT": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "gpu.json").read_text())
    assert list(told) == ["rehearsal", "facts", "pins", "pinning", "checks", "bandwidth", "beside"]
    assert told["rehearsal"] and not any("error" in step for step in told.values() if isinstance(step, dict))
    assert told["checks"]["checks"] == len(CASES) and told["checks"]["failed"] == {}


@pytest.mark.skipif(MACHINE is not None, reason="there is CUDA")
def test_without_cuda_nothing_is_run_and_that_is_said(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu")]
    done = subprocess.run(command, env={"OUT": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert "nothing was run" in done.stdout and not list(tmp_path.iterdir())
