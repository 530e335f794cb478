"""The README: its Python runs as it stands, beside a server with the defaults, and finds what it has stored."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


def test_there_is_python_in_the_readme() -> None:
    assert BLOCKS
    assert all(block.strip() for block in BLOCKS)


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An environment in which a server runs as `async-cache serve` starts it."""
    home = tmp_path_factory.mktemp("home")
    environ = os.environ | {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "XDG_RUNTIME_DIR": str(home),
        "ASYNC_CACHE_L1_BYTES": "16MiB",
    }
    command = [sys.executable, "-m", "async_cache", "serve"]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert any(line.startswith("serving at") for line in server.stdout)
        yield environ
        server.terminate()
        assert server.wait(100) == 0


@pytest.mark.parametrize("block", BLOCKS, ids=[str(number) for number in range(len(BLOCKS))])
def test_the_python_of_the_readme_runs(block: str, tmp_path: Path, environ: dict[str, str]) -> None:
    command = [sys.executable, "-W", "error", "-c", block]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^8 (of 9 )?tokens are cached$", done.stdout, re.MULTILINE)
    assert "the chunks begin with [b'\\x01\\x01', b'\\x02\\x02']\n" in done.stdout
