"""AgentScheduler in a real engine, in float32, against stock vLLM: the same tokens, whatever happens on the way.

Both engines live in this process, one after the other; stock runs first and its tokens are the reference.
"""

import gc
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

BLOCKS = 33
"""A KV cache so small that the requests below preempt one another: 128 tokens per block on CPU."""
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Lima"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


PREEMPTED: list[str] = []


@dataclass
class Job:
    """A request of the mix: when it comes, what it asks, and after how many of its tokens its client goes away."""

    name: str
    step: int
    prompt: list[int]
    parameters: SamplingParams
    abort_after: int | None = None


def mixed_jobs(seed: int = 1) -> list[Job]:
    """Thirty requests: shared prefixes, seeds, log-probabilities, penalties, structured output, and some aborts."""
    rng = random.Random(seed)
    shared = [rng.randrange(3, 4000) for _ in range(900)]
    jobs = []
    for number in range(30):
        tail = [rng.randrange(3, 4000) for _ in range(rng.randint(5, 700))]
        prompt = shared[: rng.choice((0, 260, 900))] + tail
        kind = number % 6
        given: dict[str, Any] = {
            "max_tokens": rng.randint(60, 220),
            "ignore_eos": True,
            "temperature": 0.0,
            "logprobs": 1,
        }
        if kind == 1:
            given |= {"temperature": 0.9, "seed": number, "top_p": 0.9}
        if kind == 2:
            given |= {"logprobs": 3}
        if kind == 3:
            given |= {"repetition_penalty": 1.2, "presence_penalty": 0.3}
        if kind == 4:
            given |= {
                "structured_outputs": StructuredOutputsParams(json=SCHEMA),
                "ignore_eos": False,
                "max_tokens": 120,
            }
        abort_after = rng.randint(1, 10) if kind == 5 and number > 6 else None
        jobs.append(Job(f"job-{number}", number, prompt, SamplingParams(**given), abort_after))
    return jobs


@dataclass
class Answer:
    tokens: list[int]
    text: str
    logprobs: list[dict[int, float]] | None


def run_jobs(llm: LLM, jobs: list[Job]) -> dict[str, Answer]:
    """Feeds the jobs to the engine step by step; aborted ones answer with what they had."""
    engine = llm.llm_engine
    todo = sorted(jobs, key=lambda job: job.step)
    by_name = {job.name: job for job in jobs}
    answers: dict[str, Answer] = {}
    step = 0
    while todo or engine.has_unfinished_requests():
        while todo and todo[0].step <= step:
            job = todo.pop(0)
            engine.add_request(job.name, {"prompt_token_ids": job.prompt}, job.parameters)
        for output in engine.step():
            completion = output.outputs[0]
            logprobs = completion.logprobs and [
                {token: entry.logprob for token, entry in position.items()} for position in completion.logprobs
            ]
            answers[output.request_id] = Answer(list(completion.token_ids), completion.text, logprobs)
            job = by_name[output.request_id]
            if job.abort_after is not None and len(completion.token_ids) >= job.abort_after:
                engine.abort_request([job.name])
        step += 1
    return answers


def make_llm(toy_model: Path, ours: dict[str, Any] | None) -> LLM:
    given: dict[str, Any] = {}
    if ours is not None:
        given = {"scheduler_cls": "vllm_agentserve.AgentScheduler", "additional_config": {"agentserve": ours}}
    return LLM(
        str(toy_model),
        dtype="float32",
        max_model_len=4096,
        max_num_seqs=16,
        max_num_batched_tokens=4096,
        num_gpu_blocks_override=BLOCKS,
        kv_cache_memory_bytes=1 << 30,
        enforce_eager=True,
        **given,
    )


def scheduler_of(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def close(llm: LLM) -> None:
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()


@pytest.fixture(scope="module")
def reference(toy_model: Path) -> dict[str, Answer]:
    llm = make_llm(toy_model, None)
    answers = run_jobs(llm, mixed_jobs())
    close(llm)
    return answers


@pytest.fixture(scope="module")
def ours(toy_model: Path, reference: dict[str, Answer]) -> Iterator[LLM]:
    """One engine for all tests below; a target it cannot miss by much makes every prompt a matter of many small chunks."""
    llm = make_llm(toy_model, {"mode": "time-sliced", "tpot_slo_ms": 15, "first_chunk_tokens": 16})
    scheduler = scheduler_of(llm)
    preempt = scheduler._preempt_request

    def counted(request: Any, *args: Any, **kwargs: Any) -> None:
        PREEMPTED.append(request.request_id)
        preempt(request, *args, **kwargs)

    scheduler._preempt_request = counted
    yield llm
    close(llm)


@pytest.fixture(scope="module")
def answers(ours: LLM) -> dict[str, Answer]:
    return run_jobs(ours, mixed_jobs())


def test_the_mix_was_a_hard_one(ours: LLM, answers: dict[str, Answer]) -> None:
    """The runs below would prove little if nothing had been cut, preempted or resumed."""
    counts = scheduler_of(ours)._stats.counts
    assert PREEMPTED
    assert counts["mixed_steps"] > 30
    assert counts["resume_prefill_requests"] > 0
    assert counts["prefill_chunks"] > len(answers)


@pytest.mark.parametrize("name", [job.name for job in mixed_jobs() if job.abort_after is None])
def test_tokens_equal_stock(name: str, reference: dict[str, Answer], answers: dict[str, Answer]) -> None:
    assert answers[name].tokens == reference[name].tokens


def test_aborted_requests_got_the_same_tokens_until_then(
    reference: dict[str, Answer], answers: dict[str, Answer]
) -> None:
    for job in mixed_jobs():
        if job.abort_after is not None:
            had = min(len(answers[job.name].tokens), len(reference[job.name].tokens))
            assert had >= 1
            assert answers[job.name].tokens[:had] == reference[job.name].tokens[:had]


def test_log_probabilities_equal_stock(reference: dict[str, Answer], answers: dict[str, Answer]) -> None:
    """They show what the tokens of a toy model, which repeats itself, may not."""
    compared = 0
    for job in mixed_jobs():
        if job.abort_after is not None:
            continue
        for ours_at, stock_at in zip(answers[job.name].logprobs, reference[job.name].logprobs, strict=True):
            assert ours_at == pytest.approx(stock_at, abs=2e-4)
            compared += 1
    assert compared > 1000


def test_structured_output_is_valid(answers: dict[str, Answer]) -> None:
    checked = 0
    for job in mixed_jobs():
        if job.parameters.structured_outputs is not None:
            value = json.loads(answers[job.name].text)
            assert value["city"] in ("Oslo", "Lima")
            assert 1 <= value["days"] <= 9
            checked += 1
    assert checked == 5


def test_seeds_are_honoured(ours: LLM, answers: dict[str, Answer]) -> None:
    """The same seeded requests again, alone this time, give what they gave in the crowd."""
    seeded = [job for job in mixed_jobs() if job.parameters.seed is not None][:3]
    again = run_jobs(ours, [Job(f"again-{job.name}", 0, job.prompt, job.parameters) for job in seeded])
    for job in seeded:
        assert again[f"again-{job.name}"].tokens == answers[job.name].tokens


def test_nothing_is_left_behind(ours: LLM, answers: dict[str, Answer]) -> None:
    scheduler = scheduler_of(ours)
    assert not scheduler.requests
    assert not scheduler.running
    assert not scheduler.waiting
    assert not scheduler._prefills
    assert not scheduler._queue._places
    assert scheduler.kv_cache_manager.usage == 0.0


def test_reset_prefix_cache_while_requests_run(ours: LLM, answers: dict[str, Answer]) -> None:
    jobs = [
        Job(f"reset-{n}", 0, [n + 5] * 600, SamplingParams(max_tokens=30, ignore_eos=True, temperature=0))
        for n in range(4)
    ]
    engine = ours.llm_engine
    plain = run_jobs(ours, jobs)
    for job in jobs:
        engine.add_request(f"again-{job.name}", {"prompt_token_ids": job.prompt}, job.parameters)
    got: dict[str, list[int]] = {}
    step = 0
    while engine.has_unfinished_requests():
        if step in (2, 9):
            assert scheduler_of(ours).reset_prefix_cache(reset_running_requests=True)
        for output in engine.step():
            got[output.request_id] = list(output.outputs[0].token_ids)
        step += 1
    assert {name: answer.tokens for name, answer in plain.items()} == {
        name.removeprefix("again-"): tokens for name, tokens in got.items()
    }
