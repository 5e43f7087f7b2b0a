"""What all tests share: the environment, markers of folders, one toy model, and what stock vLLM answers."""

import gc
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

import tests.support.environment  # noqa: F401  before anything imports vLLM
from tests.support.interrupts import heed_ctrl_c
from tests.support.paths import ROOT
from vllm_agentserve.vllm_compat import installed_vllm

if TYPE_CHECKING:
    from vllm_agentserve.gpucheck.scripted_requests import Completions

ENGINES = ROOT / "tests" / "engine"

# How long an example takes says nothing on a busy machine.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


def pytest_configure() -> None:
    heed_ctrl_c()


def pytest_report_header() -> str:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return "no vLLM"
    written = re.search(r"version = '([^']+)'", Path(spec.origin).with_name("_version.py").read_text())
    return f"vLLM {installed_vllm()}, sources of {written[1] if written else 'an unknown version'}"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What imports leave lives as long as the tests: the garbage collector does not look at it again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(ENGINES):
            item.add_marker(pytest.mark.engine)


@pytest.fixture(scope="session")
def stock(toy_model: Path) -> "Completions":
    """What stock vLLM answers to `mix.mixed_requests()` and `mix.cold_requests()`, in an engine that is gone again."""
    from tests.support import mix

    llm = mix.make_llm(toy_model, None)
    answers = mix.run_requests(llm, mix.mixed_requests()) | mix.run_requests(llm, mix.cold_requests())
    mix.close(llm)
    return answers


@pytest.fixture(scope="session")
def toy_model() -> Path:
    from vllm_agentserve.toy import make_toy_model

    return make_toy_model()
