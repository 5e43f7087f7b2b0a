"""The contract with Ray: it holds for the installed version, and the extra pins that one."""

import importlib.util
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from vllm_contract.check import Status, check_symbols
from vllm_contract.contract_ray import RAY_CONTRACT, VERSION
from vllm_contract.sources import Sources
from vllm_contract.symbols import Use

from tests.support.paths import ROOT

PACKAGE = ROOT / "vllm_agentserve"


def test_the_extra_pins_the_version_of_the_contract() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"ray[serve]=={VERSION}" in project["optional-dependencies"]["cluster"]
    assert not [one for one in project["optional-dependencies"]["cluster"] if one.startswith("ray[llm]")]


def test_the_contract_with_ray_says_where_a_symbol_is_used() -> None:
    for one in RAY_CONTRACT:
        for user in one.users:
            text = (PACKAGE / user).read_text()
            if one.use is not Use.TEXT and one.name not in ("SERVE_SESSION_ID", "ReplicaRank.local_rank"):
                assert one.name.split(".")[-1] in text, f"{user} does not use {one.name}"


def test_the_installed_ray_keeps_the_contract() -> None:
    spec = importlib.util.find_spec("ray")
    if spec is None or spec.origin is None:
        pytest.skip("Ray is not installed: it comes with the extra `cluster`")
    assert version("ray") == VERSION
    found = check_symbols(Sources(Path(spec.origin).parent.parent), RAY_CONTRACT)
    assert [str(one) for one in found if one.status is not Status.PRESENT] == []
