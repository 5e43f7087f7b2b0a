"""What the check of vLLM's sources makes of planted changes, and of versions that cannot be had."""

import zipfile
from pathlib import Path

import pytest
from vllm_contract.check import Status, SymbolResult, check_symbol
from vllm_contract.sources import Sources
from vllm_contract.symbols import Symbol, Use, calls, exports, implements, overrides, reads, says

from tests.support.compat_tool import compat

ENGINE = """
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar
from .base import Base as Parent
if TYPE_CHECKING:
    lazy: int

@dataclass
class Data:
    first: int
    second: list[int] = field(default_factory=list)
    kind: ClassVar[str] = "x"

class Engine(Parent):
    limit = 3
    def __init__(self, config, *args):
        self.config, self.other = config, 1
    @property
    def width(self): return 1
    def step(self, request, tokens=1): return self.helper(request)
    @staticmethod
    def name(kind): return kind
    @abstractmethod
    def log(self): ...
"""
BASE = """
class Base:
    def helper(self, request, *, fast=False):
        self.inherited: int = 1
    def outer(self):
        def nested(): return helper(1)
"""
PLANTED = (
    *exports("vllm.engine", "cli.py", "Engine lazy Parent"),
    *reads("vllm.engine:Engine", "cli.py", "config other inherited limit width"),
    *calls("vllm.engine:Engine", "cli.py", step="request", helper="request fast=", name="kind", __init__="config"),
    *overrides("vllm.engine:Engine", "cli.py", step="request tokens", helper="request ..."),
    *calls("vllm.engine", "cli.py", Data="first="),
    *implements("vllm.engine:Engine", "cli.py", "log"),
    *says("vllm.engine:Engine.step", "cli.py", "self.helper(request)"),
    *says("vllm.engine:Engine.outer.nested", "cli.py", "helper(1)"),
)


def findings(
    folder: Path, engine: str = ENGINE, base: str = BASE, **others: str
) -> dict[tuple[str, Use], SymbolResult]:
    """What is found of `PLANTED` in a tree with these two modules, and others by name."""
    (folder / "vllm").mkdir()
    for name, text in {"__init__": "", "engine": engine, "base": base, **others}.items():
        (folder / "vllm" / f"{name}.py").write_text(text)
    return {(one.name, one.use): check_symbol(Sources(folder), one) for one in PLANTED}


def test_a_tree_that_fits(tmp_path: Path) -> None:
    assert {str(one) for one in findings(tmp_path).values() if one.status is not Status.PRESENT} == set()


@pytest.mark.parametrize(
    ("before", "after", "name", "use", "status", "detail"),
    [
        ("def helper(", "def helped(", "Engine.helper", Use.CALL, Status.GONE, "nothing is called 'helper'"),
        ("fast=False", "quick=False", "Engine.helper", Use.CALL, Status.CHANGED, "parameter 'fast' is gone"),
        ("tokens=1", "count=1", "Engine.step", Use.OVERRIDE, Status.CHANGED, "'count' stands in its place"),
        (
            "request, tokens=1",
            "request, tokens",
            "Engine.step",
            Use.CALL,
            Status.CHANGED,
            "required parameter 'tokens'",
        ),
        ("tokens=1", "tokens=1, more=2", "Engine.step", Use.OVERRIDE, Status.CHANGED, "new parameter 'more'"),
        ("tokens=1", "tokens=1, **more", "Engine.step", Use.OVERRIDE, Status.CHANGED, "any further parameters"),
        ("(self, request, tokens=1)", "(self)", "Engine.step", Use.CALL, Status.CHANGED, "'request' is gone"),
        ("self.inherited:", "self.renamed:", "Engine.inherited", Use.READ, Status.GONE, "'inherited'"),
        ("@property", "", "Engine.width", Use.READ, Status.CHANGED, "it is a method, and was an attribute"),
        ("def step(", "@property\n    def step(", "Engine.step", Use.CALL, Status.CHANGED, "no function any more"),
        ("second: list", "new: int\n    second: list", "Data", Use.CALL, Status.CHANGED, "required parameter 'new'"),
        (
            "    limit = 3",
            "    @abstractmethod\n    def more(self): ...",
            "Engine",
            Use.IMPLEMENT,
            Status.CHANGED,
            "'more'",
        ),
        ("self.helper(request)", "1", "Engine.step", Use.TEXT, Status.CHANGED, "its source no longer holds"),
        ("lazy: int", "pass", "lazy", Use.READ, Status.GONE, "nothing is called 'lazy'"),
    ],
)
def test_a_change_is_noticed(
    tmp_path: Path, before: str, after: str, name: str, use: Use, status: Status, detail: str
) -> None:
    assert before in ENGINE + BASE
    found = findings(tmp_path, ENGINE.replace(before, after), BASE.replace(before, after))[name, use]
    assert found.status is status
    assert detail in found.detail
    assert "used in cli.py" in str(found)


def test_a_class_that_moved_is_found(tmp_path: Path) -> None:
    found = findings(tmp_path, engine="", other=ENGINE)
    assert found["Engine", Use.IMPLEMENT].status is Status.MOVED
    assert "'Engine' is now in vllm.other" in str(found["Engine", Use.IMPLEMENT])
    assert found["Engine.limit", Use.READ].status is Status.MOVED


def test_a_class_that_moved_and_can_still_be_imported_is_present(tmp_path: Path) -> None:
    found = findings(tmp_path, engine="from vllm.other import *", other=ENGINE)
    assert {str(one) for one in found.values() if one.status is not Status.PRESENT} == set()


def test_a_method_that_moved_to_another_class_is_found(tmp_path: Path) -> None:
    base = "class Base:\n    inherited = 1\n    def outer(self): ...\n"
    found = findings(tmp_path, base=base, other=BASE)["Engine.helper", Use.CALL]
    assert (found.status, found.detail) == (Status.MOVED, "'helper' is now in vllm.other")


# -- the tool -------------------------------------------------------------------------------------------------------------


def test_a_wheel_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(version: str, place: Path) -> Path:
        asked.append(version)
        with zipfile.ZipFile(place / "vllm.whl", "w") as archive:
            archive.writestr("vllm/engine.py", ENGINE)
            archive.writestr("vllm/kernels.so", "binary")
        return place / "vllm.whl"

    monkeypatch.setattr(compat, "downloaded", download)
    folders = [compat.fetched_sources("9.9.0", tmp_path) for _ in range(2)]
    assert asked == ["9.9.0"]
    assert folders[0] == folders[1]
    assert [path.name for path in folders[0].rglob("*.*")] == ["engine.py"]
    assert list(tmp_path.iterdir()) == [folders[0]]


def test_a_version_that_cannot_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert compat.main(["--version", "9.9.0"]) == 2
    assert "vLLM 9.9.0 cannot be fetched: is there such a version" in capsys.readouterr().err
    assert compat.main(["--version", "../here"]) == 2
    assert "'../here' is no version of vLLM" in capsys.readouterr().err
    assert list((tmp_path / "vllm_agentserve").iterdir()) == []


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    symbol = Symbol("vllm.v1.request", "Request.age", Use.READ, ("cli.py",))
    monkeypatch.setattr(compat, "CONTRACT", (symbol,))
    assert compat.main([]) == 1
    said = capsys.readouterr().out
    assert "gone: vllm.v1.request:Request.age: nothing is called 'age' any more (used in cli.py)" in said
    assert "0 of 1 symbols are where they were, 0 problem(s) with patches" in said
    monkeypatch.setattr(compat, "CONTRACT", (Symbol("vllm.v1.request", "Request.status", Use.READ, ("cli.py",)),))
    assert compat.main([]) == 0


def test_patches_that_do_not_apply_are_named(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "a.py").write_text("x = 1\n")
    patches = tmp_path / "patches"
    for minor, line in (("9.8", "x = 1"), ("9.9", "x = 2")):
        (patches / minor).mkdir(parents=True)
        (patches / minor / "a.patch").write_text(f"--- a/vllm/a.py\n+++ b/vllm/a.py\n@@ -1 +1 @@\n-{line}\n+x = 3\n")
    assert compat.refused_patches("9.8.0", tmp_path, patches) == []
    (refused,) = compat.refused_patches("9.9.1", tmp_path, patches)
    assert refused.startswith("patches/9.9/a.patch: error: patch failed")
    assert compat.refused_patches("9.7.0", tmp_path, patches) == [
        "patches/9.7: there are no patches for this minor version"
    ]
    (patches / "9.9" / "a.patch").rename(patches / "9.9" / "b.patch")
    assert compat.refused_patches("9.8.0", tmp_path, patches) == [
        "patches/9.8/b.patch: there is one for another minor version only"
    ]
