"""The lane with vLLM's default flags: it compiles its model before it says that it is ready, and answers as stock does."""

import itertools
import shutil
from pathlib import Path

import pytest

from tests.support.lane_engine import LANES, counts, lanes_run_here, run_cold, worker, wrong
from tests.support.mix import close, make_llm
from vllm_agentserve.gpucheck.scripted_requests import Completions


@lanes_run_here
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs what vLLM compiles with")
def test_the_first_chunk_compiles_nothing(toy_model: Path, stock: Completions) -> None:
    """Without `enforce_eager`. The time from the first chunk to the second is held against those between others: compiling the
    toy takes three hundred times as long as a chunk."""
    llm = make_llm(toy_model, LANES, enforce_eager=False)
    try:
        counters, beats = worker()._lane._counters, []  # type: ignore[union-attr]

        def watch(step: int) -> None:
            if counters["beat"] and counters["beat"] not in beats[-1:]:
                beats.append(counters["beat"])

        assert wrong(stock, run_cold(llm, watch)) == []
        assert (counts(llm)["lane_requests"], counts(llm)["lane_failed_requests"]) == (2, 0)
        gaps = [after - before for before, after in itertools.pairwise(beats)]
        assert len(gaps) > 10
        assert gaps[0] < 30 * max(gaps[1:])
        assert worker()._lane._chunk_s > 0.0  # type: ignore[union-attr]
    finally:
        close(llm)
