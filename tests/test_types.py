"""The README's Python, the examples and the notebook pass `mypy --strict`, as a user would run it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import pytest

pytest.importorskip("mypy")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
SECONDS = 300  # with an empty cache it reads torch and transformers: a minute, and more on a busy machine


def blocks(markdown: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", markdown, re.MULTILINE | re.DOTALL)


def cells(notebook: Path) -> list[str]:
    every = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in every if cell["cell_type"] == "code"]


@pytest.mark.timeout(SECONDS + 10)
def test_what_users_are_shown_is_well_typed(tmp_path: Path) -> None:
    for number, block in enumerate(blocks((ROOT / "README.md").read_text())):
        (tmp_path / f"readme_{number}.py").write_text(block)
    for example in (ROOT / "examples").rglob("*.py"):
        shutil.copy(example, tmp_path)
    for notebook in (ROOT / "examples").glob("*.ipynb"):
        body = indent("\n\n".join(cells(notebook)), "    ")
        (tmp_path / f"{notebook.stem}.py").write_text(f"async def notebook() -> None:\n{body}\n")  # it awaits
    cache = ROOT / ".mypy_cache" / "users"
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={cache}", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
