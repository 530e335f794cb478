"""The documentation as a site: every page has a place, and the code of those that teach runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def pages(part: object) -> list[str]:
    """The files that a part of the navigation names."""
    if isinstance(part, str):
        return [part]
    return [page for inner in (part.values() if isinstance(part, dict) else part) for page in pages(inner)]  # type: ignore[attr-defined]


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / name).read_text(), re.MULTILINE | re.DOTALL)


def test_every_page_has_one_place_in_the_navigation() -> None:
    there = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
    assert sorted(pages(SITE["nav"])) == there


def test_the_tutorial_prints_what_it_says(tmp_path: Path) -> None:
    (code,), (printed,) = blocks("tutorial.md", "python"), blocks("tutorial.md", "text")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (printed, "")


@pytest.mark.parametrize(
    "page", [str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md") if "```python" in path.read_text()]
)
def test_the_python_of_a_page_runs_when_it_is_pasted_as_it_stands(page: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", "\n".join(blocks(page, "python"))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_test_of_a_scheduler_runs(tmp_path: Path) -> None:
    conftest, test = blocks("testing.md", "python")
    (tmp_path / "conftest.py").write_text(conftest)
    (tmp_path / "test_scheduler.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "1 passed" in done.stdout, done.stdout


def test_what_the_reference_names_is_exported() -> None:
    import async_cache

    (named,) = re.findall(r"members: \[(.*)\]", (DOCS / "api.md").read_text())
    errors = {name for name in async_cache.__all__ if name.endswith("Error")}  # they have a part of their own
    assert set(named.split(", ")) == set(async_cache.__all__) - errors - {"__version__"}


@pytest.mark.parametrize("picture", ["page_light.png", "page_dark.png", "page_phone.png"])
def test_pictures_are_shown_somewhere(picture: str) -> None:
    assert any(f"]({picture})" in path.read_text() for path in DOCS.glob("*.md"))
