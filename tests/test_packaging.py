"""What is installed: torch is an extra, names and versions agree, and the documents point to what is there."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import async_cache

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]

IMPORTED = {
    "async_cache.integrations.transformers": ("torch", "transformers"),
    "async_cache.testing.virtual": ("async_solipsism", "testing"),
}
"""Modules that only those import who have an extra: what is missing without it, and its name."""
WITHOUT_TORCH = """
import asyncio, sys
sys.modules |= dict.fromkeys(("torch", "numpy"))
sys.modules |= dict.fromkeys(("aiofiles", "typer", "rich", "starlette", "uvicorn", "prometheus_client"))
from async_cache import AsyncCache, CacheConfig, ModelLayout, ObjectGroup

async def main():
    layout = ModelLayout("toy", (ObjectGroup((4,), "uint8"),), chunk_tokens=4)
    prompt = layout.prompt(range(4))
    async with AsyncCache(CacheConfig(l1_bytes=2**20, l2=["memory://"])) as cache:
        async with cache.store(prompt) as writer:
            for chunk in writer:
                chunk.views[0][:] = b"abcd"
                chunk.commit()
        async with cache.read((await cache.prefetch(prompt).load_done).request_id) as lease:
            print([bytes(chunk.views[0]) for chunk in lease])
            lease[0].tensors()

asyncio.run(main())
"""


def needed(extra: str) -> set[str]:
    """What an extra installs, by name, with what the extras that it names install."""
    names: set[str] = set()
    for requirement in EXTRAS[extra]:
        own = re.match(rf"{PROJECT['name']}\[(.*)\]", requirement)
        names |= set().union(*map(needed, own[1].split(","))) if own else {re.split(r"[^\w.-]", requirement)[0]}
    return names


def test_without_the_extras_a_cache_works_but_for_tensors() -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.stdout == "[b'abcd']\n"
    assert "ImportError: tensors need torch: pip install 'async-kv-cache[torch]'" in done.stderr


@pytest.mark.parametrize("missing", ["typer", "rich", "starlette", "uvicorn", "prometheus_client", "aiofiles"])
def test_a_command_says_which_extra_it_needs(missing: str) -> None:
    code = f"import sys; sys.modules['{missing}'] = None; sys.argv[1:] = ['serve']"
    code += "; from async_cache.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150, check=False)
    needs = "the commands need the extra server: pip install 'async-kv-cache[server]'"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"async-cache: {missing} is not installed; {needs}\n")


def test_a_command_does_without_what_only_a_server_needs() -> None:
    needless = ("aiofiles", "starlette", "uvicorn", "prometheus_client")
    code = f"import sys; sys.modules |= dict.fromkeys({needless}); sys.argv[1:] = ['ping', '--url', 'unix:///none']"
    code += "; from async_cache.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("async-cache: there is no server at unix:///none")


def test_the_policy_that_learns_says_which_extra_it_needs_and_the_others_do_without() -> None:
    code = """
import sys
sys.modules["numpy"] = None
from async_cache.errors import ConfigError
from async_cache.retention.policies import NAMES, make_policy
for name in NAMES:
    try:
        make_policy(name, lambda: 0.0)
    except ConfigError as error:
        print(error)
"""
    told = subprocess.check_output([sys.executable, "-c", code], text=True, timeout=150)
    needs = "the policy prefix needs the extra prefix: pip install 'async-kv-cache[prefix]'"
    assert told == f"numpy is not installed; {needs}\n"
    assert needed("prefix") <= needed("server"), "`replay` compares all policies"


def test_only_extras_need_torch() -> None:
    assert not any(re.match(r"torch|numpy", requirement) for requirement in PROJECT["dependencies"])
    assert [extra for extra in EXTRAS if "torch" in needed(extra)] == ["torch", "transformers", "demo", "dev"]


@pytest.mark.parametrize("path", [*DOCUMENTS, *(ROOT / "async_cache").rglob("*.py")], ids=lambda path: path.name)
def test_an_extra_that_is_named_exists(path: Path) -> None:
    text = path.read_text()
    assert "async_cache[" not in text, "the distribution is called async-kv-cache"
    named = re.findall(r"(?:async-kv-cache|'\.)\[([\w,]+)\]", text)
    assert {extra for extras in named for extra in extras.split(",")} <= set(EXTRAS)


def test_types_are_shipped() -> None:
    assert (Path(async_cache.__file__).parent / "py.typed").exists()


def test_the_version_has_a_place_in_the_changelog() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", async_cache.__version__)
    assert f"\n## {async_cache.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_targets_of_make_are_those_that_are_described() -> None:
    targets = set(re.findall(r"^([a-z0-9]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)) - {"help"}
    assert set(re.findall(r"\bmake ([a-z0-9]+)", (ROOT / "CONTRIBUTING.md").read_text())) == targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_of_a_document_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\((?!https?://)([^)\s]*)\)", document.read_text()):
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


def test_the_chart_shows_the_table(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "benchmarks" / "chart.py", tmp_path / "chart.svg"], check=True, timeout=150)
    assert (tmp_path / "chart.svg").read_text() == (ROOT / "docs" / "benchmarks.svg").read_text()


@pytest.mark.parametrize("module", IMPORTED)
def test_who_imports_a_module_without_its_extra_is_told_the_extra(module: str) -> None:
    missing, extra = IMPORTED[module]
    code = f"import sys; sys.modules[{missing!r}] = None; import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert re.search(rf"^ImportError: .* pip install 'async-kv-cache\[{extra}\]'$", done.stderr, re.MULTILINE)
