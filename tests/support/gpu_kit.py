"""What the tests of the GPU check share: a folder for results on this CPU, and made-up answers."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support import bench_records
from vllm_agentserve.bench.device import has_nvidia_driver
from vllm_agentserve.bench.records import Record
from vllm_agentserve.bench.server import serving_environment
from vllm_agentserve.gpucheck.check_run import CheckRun, child_environment
from vllm_agentserve.gpucheck.scripted_requests import Answer

needs_cpu_build = pytest.mark.skipif(has_nvidia_driver(), reason="vLLM takes the GPU where there is one")


def here(folder: Path) -> CheckRun:
    return CheckRun(folder, "cpu", True, child_environment(os.environ, serving_environment(base={})))


def answer(tokens: Sequence[int], apart: float = 0.0, other: int = 99, margin: float = 1.0) -> Answer:
    """An answer whose tokens all have log-probability -1 + `apart`, and whose second choice is `other`."""
    return Answer(list(tokens), [{token: -1.0 + apart, other: -1.0 - margin} for token in tokens])


def record(session: str, sent_us: int, *stamps_us: int) -> Record:
    """A request of a session, sent then, with tokens at these times, in µs."""
    return bench_records.record(
        session,
        prompt="",
        prompt_tokens=9,
        wanted_tokens=len(stamps_us),
        sent_us=sent_us,
        ended_us=stamps_us[-1],
        stamps_us=list(stamps_us),
    )
