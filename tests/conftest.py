"""Shared set-up: the environment vLLM needs on a machine without hub and GPU, and one toy model for all tests."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vllm_agentserve.bench.server import serving_environment

for name, value in serving_environment().items():
    os.environ.setdefault(name, value)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parent))


if TYPE_CHECKING:
    from mix import Answers


@pytest.fixture(scope="session")
def stock(toy_model: Path) -> "Answers":
    """What stock vLLM answers to `mix.mixed_jobs()` and `mix.cold_jobs()`, in an engine that is gone again."""
    import mix

    llm = mix.make_llm(toy_model, None)
    answers = mix.run_jobs(llm, mix.mixed_jobs()) | mix.run_jobs(llm, mix.cold_jobs())
    mix.close(llm)
    return answers


@pytest.fixture(scope="session")
def toy_model() -> Path:
    from vllm_agentserve.toy import make_toy_model

    return make_toy_model()
