"""The backend of another package, in `examples/sqlite_backend`: built, installed, admitted by the suite, and served."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "examples" / "sqlite_backend"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that finds the package, built and installed."""
    site = tmp_path_factory.mktemp("site")
    offline = ("--no-build-isolation", "--no-deps", "--no-index", "--quiet")
    command = (sys.executable, "-m", "pip", "install", *offline, "--target", site, PACKAGE)
    subprocess.run(command, check=True, timeout=150)
    return {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}


def test_it_passes_the_suite(environment: dict[str, str], tmp_path: Path) -> None:
    options = ("-q", "-p", "no:cacheprovider", "-o", "asyncio_mode=auto", f"--basetemp={tmp_path / 'base'}")
    command = (sys.executable, "-m", "pytest", *options, f"--rootdir={PACKAGE}", PACKAGE)
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout or "[100%]" in done.stdout


def test_a_command_takes_its_urls(environment: dict[str, str], tmp_path: Path) -> None:
    def config(url: str) -> "subprocess.CompletedProcess[str]":
        command = (sys.executable, "-m", "async_cache", "config")
        settings = {**environment, "ASYNC_CACHE_L2": url}
        return subprocess.run(command, env=settings, cwd=tmp_path, capture_output=True, text=True, timeout=150)

    assert f"sqlite://{tmp_path}/kv.db" in config(f"sqlite://{tmp_path}/kv.db").stdout.replace("\n", "")
    refused = config("sqlite://host/kv.db")
    assert refused.returncode
    assert "sqlite:///path" in refused.stderr


def test_the_documents_show_it_as_it_is() -> None:
    shown = re.search(r"```python\n# kv_sqlite.py\n(.*?)```", (ROOT / "docs" / "backends.md").read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1] == (PACKAGE / "kv_sqlite.py").read_text()
