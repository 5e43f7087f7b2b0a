"""Host memory in a real engine, in float32: answers are stock's, from contexts that the KV cache has lost."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM
from vllm.distributed.kv_transfer import get_kv_transfer_group

from tests.support.mix import close, make_llm, mixed_requests, run_requests, scheduler_of
from tests.support.pressed_agents import BLOCKS, TURNS, contexts, run_agents
from vllm_agentserve.bench.device import has_nvidia_driver
from vllm_agentserve.bench.records import Record
from vllm_agentserve.gpucheck.compare import differences
from vllm_agentserve.vllm_compat.cpu_offload import BlockCopies

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(has_nvidia_driver(), reason="copies of the CPU build"),
]

AGENTS = 12
"""Their contexts are three times the KV cache."""
MIX = mixed_requests()[:64]
SMALL_GIB = 0.03
HOST = {"mode": "time-sliced", "tpot_slo_ms": 400, "load_control": False, "kv_host_gib": 0.25}


@pytest.fixture(scope="module")
def stocks(toy_model: Path) -> tuple[list[Record], Any]:
    llm = make_llm(toy_model, None, blocks=BLOCKS)
    records, answers = run_agents(llm, AGENTS), run_requests(llm, MIX)
    close(llm)
    return records, answers


@pytest.fixture(scope="module")
def ours(toy_model: Path, stocks: Any) -> Iterator[LLM]:
    llm = make_llm(toy_model, HOST, blocks=BLOCKS)
    yield llm
    close(llm)


@pytest.fixture
def small(toy_model: Path, stocks: Any) -> Iterator[LLM]:
    """Host memory of about half of what is live, by programs."""
    llm = make_llm(toy_model, HOST | {"kv_host_gib": SMALL_GIB, "kv_host_policy": "program"}, blocks=BLOCKS)
    yield llm
    close(llm)


def test_in_small_host_memory_programs_find_their_contexts_and_answers_are_stocks(small: LLM, stocks: Any) -> None:
    records, answers = stocks
    scheduler = scheduler_of(small)
    live = AGENTS * records[-1].prompt_tokens
    assert 0.3 * live < scheduler.host.tokens < 0.7 * live
    found = run_agents(small, AGENTS)
    prompts = {(record.session, record.turn): record.prompt for record in records}
    assert {(record.session, record.turn): record.prompt for record in found} == prompts
    assert sum(record.cached_tokens or 0 for record in found) > sum(record.cached_tokens or 0 for record in records)
    assert scheduler.counts["host_restored_requests"] >= 4
    for _ in range(2):
        assert differences(MIX, answers, run_requests(small, MIX)) == []
    assert scheduler.host.used_tokens > 0.8 * scheduler.host.tokens
    assert scheduler.integrity.faults() == []


def test_contexts_that_come_back_from_the_host_give_stocks_answers(ours: LLM, stocks: Any) -> None:
    assert isinstance(get_kv_transfer_group().connector_worker.worker, BlockCopies)
    records, _ = stocks
    found = run_agents(ours, AGENTS)

    def hits(records: list[Record]) -> int:
        return sum(record.cached_tokens or 0 for record in records)

    assert len(found) == AGENTS * TURNS
    assert contexts(found) == contexts(records)
    # Nearly all that was there before: the last block of a context is not full.
    later = [record for record in found if record.turn]
    assert sum((one.cached_tokens or 0) / one.prompt_tokens for one in later) / len(later) > 0.6
    assert hits(found) > 2 * hits(records)
    scheduler = scheduler_of(ours)
    assert scheduler.counts["host_restored_requests"] >= 16
    assert scheduler.integrity.faults() == []


def test_a_mix_that_leaves_nothing_out_gives_stocks_answers(ours: LLM, stocks: Any) -> None:
    """Twice, so that the second time prompts come back whole, with preemptions and aborts in between."""
    _, answers = stocks
    scheduler = scheduler_of(ours)
    before = scheduler.counts["host_restored_requests"]
    for _ in range(2):
        assert differences(MIX, answers, run_requests(ours, MIX)) == []
    assert scheduler.counts["host_restored_requests"] >= before + len(MIX) // 4
    assert scheduler.integrity.faults() == []
    assert ours.reset_prefix_cache()
    assert scheduler.host.used_tokens == 0
