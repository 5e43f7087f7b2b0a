"""What all tests share: the environment, one toy model, and what stock vLLM answers."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import tests.support.environment  # noqa: F401  before anything imports vLLM

if TYPE_CHECKING:
    from vllm_agentserve.gpucheck.scripted_requests import Completions


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
