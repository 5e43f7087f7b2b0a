"""The floors of the architecture page: whatever a module imports, also late or for types only, lies below it; no circles."""

import ast
import re
import tomllib
from functools import cache
from graphlib import TopologicalSorter

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "vllm_agentserve"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def floors() -> dict[str, int]:
    """Rooms by the floor they are on, 0 is the ground."""
    (block,) = re.findall(r"<!-- floors -->\n```\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(), re.DOTALL)
    lines = [line.split("  ")[0].split(" · ") for line in block.strip().splitlines()]
    return {room.strip().removesuffix("/"): number for number, rooms in enumerate(reversed(lines)) for room in rooms}


def room(module: str) -> str:
    """A package of ours or a module beside them; `__init__` is the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@cache
def imports(module: str) -> set[str]:
    """The modules of ours that it imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE.name}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else str(node.module))
    return found


def test_every_room_is_on_a_floor() -> None:
    assert set(floors()) == {room(module) for module in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_imports_lead_down(module: str) -> None:
    at = floors()
    for imported in imports(module):
        assert room(imported) == room(module) or at[room(imported)] < at[room(module)], f"{module} imports {imported}"


def test_nothing_imports_itself_in_a_circle() -> None:
    list(TopologicalSorter({module: imports(module) - {module} for module in MODULES}).static_order())


def test_the_wheel_imports_nothing_that_is_left_out_of_it() -> None:
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    out = {pattern.removesuffix("*").split(".")[1] for pattern in found["exclude"]}
    assert out == {"simulator"}
    for module in MODULES:
        if room(module) not in out:
            assert not out & {room(imported) for imported in imports(module)}, module
