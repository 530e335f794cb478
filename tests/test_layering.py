"""Rooms and floors: which folders know which others, and that nothing imports upward, in circles, or by stealth."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import async_cache

PACKAGE = Path(async_cache.__file__).parent
DESIGN = PACKAGE.parent / "docs" / "design.md"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
MAY_KNOW = {
    # what is asked, and with what
    "errors": "",
    "values": "",
    "prompt": "",
    "memory": "errors prompt",
    "aio": "errors",
    "handles": "aio errors memory prompt values",
    "retention": "errors values",
    "protocol": "errors prompt values",
    "limits": "",
    "config": "errors limits prompt protocol retention",
    "observe": "handles prompt values",
    "recording": "aio errors observe prompt",
    "ledger": "observe prompt values",
    "advice": "",
    # the tiers, and the ways through them
    "l1": "aio ledger memory observe prompt retention values",
    "l2": "aio config errors ledger prompt retention values",
    "read": "advice aio config errors handles l1 l2 ledger observe prompt values",
    "write": "aio config errors handles l1 l2 ledger observe prompt read retention values",
    "events": "handles ledger observe values",
    "tracing": "errors handles observe read values",
    "core": "aio config errors events handles l1 l2 ledger memory observe prompt read retention tracing values write",
    "cache": "aio config core handles l2 prompt values",
    # the same from other processes
    "metrics": "aio core l2 read values",
    "server": (
        "aio cache config core errors handles l2 limits memory metrics observe prompt protocol read recording values"
    ),
    "client": "aio errors handles memory prompt protocol values",
    "integrations": "advice aio cache client errors handles prompt values",
    "replay": "aio client errors l1 memory prompt recording retention values",
    "cli": "client config errors l2 memory prompt protocol recording replay retention server values",
    "__main__": "cli",
    "testing": "errors l2 prompt",
}
"""Each room (a folder, or a module beside the folders), and the rooms that it may import: all that it does import."""
LAZY = {
    ("async_cache.memory.tensors", "torch"),
    ("async_cache.tracing", "opentelemetry"),
    ("async_cache.replay.plot", "matplotlib.figure"),
    ("async_cache.retention.policies", "async_cache.retention.prefix"),  # which needs numpy
}
"""What is imported in a function, and where: an extra that most have no use for, or what needs it."""
ENTRY_POINTS = {
    ("async_cache.l2.urls.registry", "importlib.metadata"),
    ("async_cache.cli", "importlib.metadata"),  # its commands, each when it is asked for
    ("async_cache.cli.app", "importlib.metadata"),
    ("async_cache.cli.doctor", "importlib.metadata"),  # which versions are there
    ("async_cache.l2.mooncake.backend", "importlib.util"),  # to see whether an extra is there, which a helper imports
}
"""Who finds what other packages give: nothing else is imported by a name that is made up while it runs."""


def room(module: str) -> str:
    """The folder or module of async_cache that a module belongs to."""
    return module.split(".")[1]


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def walk(node: ast.AST, depth: int = 0) -> Iterator[tuple[ast.AST, int]]:
    """What runs, with the number of functions and classes around it: blocks for type checkers are left out."""
    for child in ast.iter_child_nodes(node):
        if is_for_types(child):
            continue
        yield child, depth
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda)
        yield from walk(child, depth + inside)


@cache
def imports(module: str) -> list[tuple[str, int]]:
    """Dotted names that a module imports, with their depth; also those that it keeps as text, to import them later."""
    found: list[tuple[str, int]] = []
    for node, depth in walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found += ((alias.name, depth) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner == "async_cache.__version__":  # the one thing that stands in the facade itself
                    continue
                found.append((inner if inner in MODULES else node.module, depth))
        elif isinstance(node, ast.Constant) and node.value in MODULES and node.value != "async_cache":
            found.append((node.value, 0))
    return found


def known(module: str) -> set[str]:
    """The modules of async_cache that a module imports."""
    return {name for name, _ in imports(module) if name.split(".")[0] == "async_cache"}


def test_every_room_is_in_the_table_and_in_the_docstring() -> None:
    rooms = {room(module) for module in MODULES if module != "async_cache"}
    assert set(MAY_KNOW) == rooms
    lines = re.findall(r"^- (`.*?`):", async_cache.__doc__ or "", re.MULTILINE)
    assert sorted(name for line in lines for name in re.findall(r"`(\w+)`", line)) == sorted(rooms)


@pytest.mark.parametrize("package", [m for m, path in MODULES.items() if path.name == "__init__.py" and "." in m])
def test_the_docstring_of_a_package_lists_its_modules(package: str) -> None:
    there = {module.rpartition(".")[2] for module in MODULES if module.rpartition(".")[0] == package}
    text = ast.get_docstring(ast.parse(MODULES[package].read_text())) or ""
    lines = re.findall(r"^ *((?:\w+, )*\w+)( +)\S", text, re.MULTILINE)
    listed = {name for names, _ in lines for name in names.split(", ")}
    beside = {name for names, gap in lines if len(gap) > 1 for name in names.split(", ")}
    assert not there - listed, f"{package}/__init__.py does not list {', '.join(sorted(there - listed))}"
    assert not beside - there, f"{package}/__init__.py lists what there is not: {', '.join(sorted(beside - there))}"


@pytest.mark.parametrize("module", [module for module in MODULES if module != "async_cache"])
def test_a_module_imports_only_rooms_that_its_own_may_know(module: str) -> None:
    assert "async_cache" not in known(module), "the facade is for users"
    others = {room(name) for name in known(module)} - {room(module)}
    assert others <= set(MAY_KNOW[room(module)].split())


@pytest.mark.parametrize("own", MAY_KNOW)
def test_the_table_allows_no_more_than_is_used(own: str) -> None:
    used = {
        room(name) for module in MODULES if module != "async_cache" and room(module) == own for name in known(module)
    }
    assert set(MAY_KNOW[own].split()) == used - {own}


def floors() -> dict[str, int]:
    """By room, how many floors are below it; that this ends says that there is no circle."""
    below: dict[str, int] = {}
    left = {own: set(others.split()) for own, others in MAY_KNOW.items()}
    while left:
        free = [own for own, others in left.items() if others <= set(below)]
        assert free, f"a circle among {sorted(left)}"
        for own in free:
            below[own] = max((below[other] + 1 for other in MAY_KNOW[own].split()), default=0)
            del left[own]
    return below


def test_rooms_are_no_circle_and_the_document_draws_their_floors() -> None:
    drawn = {
        name: int(floor)
        for floor, names in re.findall(r"^\| (\d+) \| (.*) \|$", DESIGN.read_text(), re.MULTILINE)
        for name in re.findall(r"`(\w+)`", names)
    }
    assert drawn == floors()


def test_modules_are_no_circle() -> None:
    left = {module: known(module) - {module} for module in MODULES}
    while free := {module for module, others in left.items() if not others & set(left)}:
        for module in free:
            del left[module]
    assert left == {}


@pytest.mark.parametrize("module", MODULES)
def test_imports_stand_at_the_top(module: str) -> None:
    assert {(module, name) for name, depth in imports(module) if depth} <= LAZY


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_imported_by_its_name(module: str) -> None:
    names = {name for name, _ in imports(module)}
    assert {(module, name) for name in names if name.split(".")[0] in ("importlib", "runpy", "pkgutil")} <= ENTRY_POINTS
    called = {node.id for node, _ in walk(ast.parse(MODULES[module].read_text())) if isinstance(node, ast.Name)}
    assert "__import__" not in called


def test_only_tensors_and_the_integrations_import_torch() -> None:
    importers = [module for module in MODULES if "torch" in {name.split(".")[0] for name, _ in imports(module)}]
    assert [name for name in importers if room(name) != "integrations"] == ["async_cache.memory.tensors"]


def test_nothing_imports_an_integration() -> None:
    importers = [
        module
        for module in MODULES
        if module == "async_cache" or room(module) != "integrations"
        if any(name.startswith("async_cache.integrations") for name in known(module))
    ]
    assert importers == []


def test_the_package_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'transformers', 'pytest', 'async_solipsism', 'obstore'}"
    modules = "sys, async_cache, async_cache.integrations, async_cache.l2.urls.registry"
    code = f"import {modules}; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_opens_with_a_line_that_says_what_it_is_for(module: str) -> None:
    docstring = ast.get_docstring(ast.parse(MODULES[module].read_text())) or ""
    assert docstring.partition("\n")[0].endswith((".", ":"))
