"""Shared set-up: the environment vLLM needs on a machine without hub and GPU, and one toy model for all tests."""

import os
import sys
from pathlib import Path

import pytest

from vllm_agentserve.bench.server import serving_environment

for name, value in serving_environment().items():
    os.environ.setdefault(name, value)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture(scope="session")
def toy_model() -> Path:
    from vllm_agentserve.toy import make_toy_model

    return make_toy_model()
