"""Programs first in a real engine, in float32: whatever the order, and whoever gives up a place, answers are stock's."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from vllm import LLM

from tests.support.mix import close, make_llm, mixed_requests, run_requests, scheduler_of
from vllm_agentserve.gpucheck.compare import differences
from vllm_agentserve.gpucheck.scripted_requests import Completions, ScriptedRequest


@pytest.fixture(scope="module", params=["plas", "atlas"])
def ours(request: pytest.FixtureRequest, toy_model: Path, stock: Completions) -> Iterator[LLM]:
    """Short quanta, a large share, and places that run short before KV blocks do: they change hands as often as they can."""
    llm = make_llm(
        toy_model,
        {
            "mode": "time-sliced",
            "tpot_slo_ms": 400,
            "policy": request.param,
            "program_quantum_ms": 1,
            "program_preempt_share": 0.5,
            "program_promote_ratio": 100_000,
        },
        blocks=100,
    )
    yield llm
    close(llm)


def requests_of_two_classes() -> list[ScriptedRequest]:
    """Nobody waits for half of them, which come first: they give up places to the others, however fast this machine is."""
    return [
        replace(request, step=6 * request.step)
        if number % 2
        else replace(request, parameters={**request.parameters, "extra_args": {"agent_class": "batch"}})
        for number, request in enumerate(mixed_requests())
    ]


def test_answers_equal_stock_under_every_policy(ours: LLM, stock: Completions) -> None:
    answers = run_requests(ours, requests_of_two_classes())
    assert differences(mixed_requests(), stock, answers) == []
    scheduler = scheduler_of(ours)
    counts, account = scheduler.counts, scheduler.engine_policy.programs.account
    assert counts["program_preemptions"] > 5, (counts, vars(account))
    assert counts["program_preempted_tokens"] > 0
    assert account.lost_ms <= 0.5 * account.service_ms
    assert not scheduler.requests
    assert not account._pending
    assert not scheduler.calls
    assert scheduler.kv_cache_manager.usage == 0.0
