"""The contract with vLLM: it holds for the supported versions, it is complete, and what moves is noticed."""

import ast
from functools import cache

import pytest
from vllm_contract.contract import CONTRACT
from vllm_contract.symbols import Use

from tests.support.compat_tool import NEWEST, compat
from tests.support.new_python import run_code
from tests.support.paths import ROOT
from vllm_agentserve.vllm_compat import SUPPORTED, installed_vllm

PACKAGE = ROOT / "vllm_agentserve"


# -- the supported versions -----------------------------------------------------------------------------------------------


def test_the_installed_vllm_keeps_the_contract() -> None:
    moved, refused = compat.compare(str(installed_vllm()), compat.installed_sources())
    assert [str(one) for one in moved] == []
    assert refused == []


@pytest.mark.timeout(1200)
def test_the_newest_supported_vllm_keeps_the_contract() -> None:
    assert NEWEST.startswith("{}.{}.".format(*SUPPORTED[-1]))
    try:
        sources = compat.fetched_sources(NEWEST)
    except compat.FetchError as error:
        pytest.skip(str(error))
    moved, refused = compat.compare(NEWEST, sources)
    assert [str(one) for one in moved] == []
    assert refused == []


# -- the contract is complete ---------------------------------------------------------------------------------------------


@cache
def our_modules() -> list[tuple[str, ast.Module]]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return [(path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())) for path in paths]


def own_names() -> set[str]:
    """What our code defines: functions, classes, variables, attributes that it sets on `self`."""
    names = set[str]()
    for _, tree in our_modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names |= {node.attr} if ast.unparse(node.value) == "self" else set()
    return names


def imported(tree: ast.Module) -> dict[str, str]:
    """By the name it has in a file: the package that an import takes it from."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                origin = (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
                found[(alias.asname or alias.name).split(".")[0]] = origin.split(".")[0]
    return found


def test_every_import_from_vllm_is_in_the_contract() -> None:
    known = {(one.module, one.name.split(".")[0]) for one in CONTRACT}
    modules = {one.module for one in CONTRACT}
    for path, tree in our_modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                for alias in node.names:
                    there = (node.module, alias.name) in known or f"{node.module}.{alias.name}" in modules
                    assert there, f"{path}:{node.lineno}: {node.module}.{alias.name}"


def test_every_private_part_of_vllm_is_in_the_contract() -> None:
    """Attributes with an underscore of something that is not `self`, not of a module of others, and not named by our code."""
    own, known = own_names(), {one.name.split(".")[-1] for one in CONTRACT}
    found = set[str]()
    for path, tree in our_modules():
        origins = imported(tree)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
                continue
            holder = ast.unparse(node.value)
            if holder in ("self", "cls") or origins.get(holder, "vllm") != "vllm" or node.attr == "_replace":
                continue
            if holder == "super()" or node.attr not in own:
                found.add(node.attr)
                assert node.attr in known, f"{path}:{node.lineno}: {ast.unparse(node)}"
    assert {"_preempt_request", "_num_lanes", "_capture_stream", "_KV_CONNECTOR_AGENT", "_make_model_runner"} <= found


def test_the_contract_says_where_a_symbol_is_used() -> None:
    for one in CONTRACT:
        assert one.users
        for user in one.users:
            text = (PACKAGE / user).read_text()
            # A class that we meet as an object only is named in no file of ours.
            if one.use is not Use.TEXT and "." in one.name and not one.name.endswith("__init__"):
                assert one.name.split(".")[1] in text, f"{user} does not use {one.name}"


def test_no_symbol_stands_there_twice() -> None:
    keys = [(one.module, one.name, one.use, one.detail) for one in CONTRACT]
    assert len(keys) == len(set(keys))


def test_the_contract_imports_neither_vllm_nor_torch() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tools'); from vllm_contract import check, contract\n"
        "print([name for name in ('torch', 'vllm') if name in sys.modules])"
    )
    done = run_code(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# -- what moves is noticed ------------------------------------------------------------------------------------------------
