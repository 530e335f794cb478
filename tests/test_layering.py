"""Floors: a module imports only what the package's docstring lists before it, and at the top of the file."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import async_cache

PACKAGE = Path(async_cache.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
ORDER = [
    name
    for line in re.findall(r"^- (`.*?`):", async_cache.__doc__ or "", re.MULTILINE)
    for name in re.findall(r"`(\w+)`", line)
]


def part(module: str) -> str:
    """The module or sub-package of async_cache that a module belongs to."""
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


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Dotted names that a module imports, with their depth; also those that it keeps as text, to import them later."""
    for node, depth in walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, depth) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner if inner in MODULES else node.module), depth
        elif isinstance(node, ast.Constant) and node.value in MODULES and node.value != "async_cache":
            yield node.value, 0


def test_the_docstring_lists_every_module_once() -> None:
    parts = {part(module) for module in MODULES if module != "async_cache"}
    assert sorted(ORDER) == sorted(parts)


@pytest.mark.parametrize("module", [module for module in MODULES if module != "async_cache"])
def test_a_module_imports_only_what_is_listed_before_it(module: str) -> None:
    own = part(module)
    ours = {name for name, _ in imports(MODULES[module]) if name.split(".")[0] == "async_cache"}
    assert "async_cache" not in ours, "the facade is for users"
    assert [name for name in ours if part(name) != own and ORDER.index(part(name)) > ORDER.index(own)] == []


@pytest.mark.parametrize("module", MODULES)
def test_imports_stand_at_the_top(module: str) -> None:
    assert [name for name, depth in imports(MODULES[module]) if depth] == []


def test_only_tensors_and_integrations_import_torch() -> None:
    importers = [
        module
        for module, path in MODULES.items()
        if part(f"{module}.") != "integrations" and "torch" in {name.split(".")[0] for name, _ in imports(path)}
    ]
    assert importers == ["async_cache.tensors"]


def test_the_package_imports_nothing_heavy() -> None:
    code = "import sys, async_cache; print({'torch', 'numpy', 'pytest', 'async_solipsism'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_opens_with_a_line_that_says_what_it_is_for(module: str) -> None:
    docstring = ast.get_docstring(ast.parse(MODULES[module].read_text())) or ""
    assert docstring.partition("\n")[0].endswith((".", ":"))
