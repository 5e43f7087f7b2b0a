"""AgentScheduler in a real engine, time-sliced, in float32: the same answers as stock vLLM, whatever happens on the way."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from tests.support.mix import REQUESTS, close, greedy, make_llm, mixed_requests, run_requests, scheduler_of
from vllm_agentserve.gpucheck.compare import differences
from vllm_agentserve.gpucheck.scripted_requests import Completions, ScriptedRequest
from vllm_agentserve.policy.step_sizes import step_sizes

PREEMPTED: list[str] = []
FIRST_STEPS: list[int] = []
"""Tokens of the steps that the worker ran before the engine was ready."""


@pytest.fixture(scope="module")
def ours(toy_model: Path, stock: Completions) -> Iterator[LLM]:
    """One engine for all tests below; a target it cannot miss by much makes every prompt a matter of many small chunks."""
    run = CPUModelRunner._dummy_run

    def dummy_run(self: Any, tokens: int, *args: Any, **kwargs: Any) -> Any:
        FIRST_STEPS.append(tokens)
        return run(self, tokens, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CPUModelRunner, "_dummy_run", dummy_run)
        options = {"mode": "time-sliced", "tpot_slo_ms": 15, "first_chunk_tokens": 16, "warm_up_s": 3}
        llm = make_llm(toy_model, options)
    scheduler = scheduler_of(llm)
    preempt = scheduler._preempt_request

    def counted(request: Any, *args: Any, **kwargs: Any) -> None:
        PREEMPTED.append(request.request_id)
        preempt(request, *args, **kwargs)

    scheduler._preempt_request = counted
    yield llm
    close(llm)


@pytest.fixture(scope="module")
def answers(ours: LLM) -> Completions:
    return run_requests(ours, mixed_requests())


def test_the_sizes_of_steps_have_run_before_the_first_request(ours: LLM) -> None:
    """As many as the time allowed, after two that draw tokens; the answers below are stock's all the same."""
    drawn, ran = FIRST_STEPS[:2], FIRST_STEPS[2:]
    assert drawn == [1, 2]
    assert ran
    assert step_sizes(16384, 8)[: len(ran)] == ran


def test_the_mix_was_a_hard_one(ours: LLM, answers: Completions) -> None:
    """The runs below would prove little if nothing had been cut, preempted or resumed."""
    counts = scheduler_of(ours).counts
    assert PREEMPTED
    assert counts["mixed_steps"] > 200
    assert counts["resume_prefill_requests"] > 50
    assert counts["prefill_chunks"] > 2 * REQUESTS
    assert sum(completion.stop_reason is not None for one in answers.values() for completion in one.values()) > 10
    assert sum(len(one) == 2 for one in answers.values()) > 20


def test_answers_equal_stock(stock: Completions, answers: Completions) -> None:
    """Tokens, texts and log-probabilities; these show what the tokens of a toy model, which repeats itself, may not."""
    assert differences(mixed_requests(), stock, answers) == []


def test_structured_output_is_valid(answers: Completions) -> None:
    checked = 0
    for request in mixed_requests():
        if "structured_outputs" in request.parameters:
            value = json.loads(answers[request.name][0].text)
            assert value["city"] in ("Oslo", "Lima")
            assert 1 <= value["days"] <= 9
            checked += 1
    assert checked == REQUESTS // 8


def test_seeds_are_honoured(ours: LLM, answers: Completions) -> None:
    """The same seeded requests again, alone this time, give what they gave in the crowd."""
    seeded = [request for request in mixed_requests() if "seed" in request.parameters][:4]
    again = run_requests(ours, [replace(request, step=0, abort_after=None) for request in seeded])
    assert differences(seeded, answers, again) == []


def test_nothing_is_left_behind(ours: LLM, answers: Completions) -> None:
    scheduler = scheduler_of(ours)
    assert not scheduler.requests
    assert not scheduler.running
    assert not scheduler.waiting
    assert not scheduler.engine_policy.prefilling
    assert not scheduler.calls
    assert scheduler.kv_cache_manager.usage == 0.0


def test_reset_prefix_cache_while_requests_run(ours: LLM, answers: Completions) -> None:
    requests = [ScriptedRequest(f"reset-{n}", 0, [n + 5] * 600, greedy(30, logprobs=None)) for n in range(4)]

    def reset(step: int) -> None:
        if step in (2, 9):
            assert scheduler_of(ours).reset_prefix_cache(reset_running_requests=True)

    plain = run_requests(ours, requests)
    assert differences(requests, plain, run_requests(ours, requests, reset)) == []
