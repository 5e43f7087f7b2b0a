"""A mix of requests that leaves nothing out, an engine to run it in, and the comparison with what stock vLLM answers."""

import gc
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

BLOCKS = 33
"""KV blocks of 128 tokens: far too few for the mix, so that sequences are preempted."""
JOBS = int(os.environ.get("AGENTSERVE_MIX", "208"))
"""Requests of the mix; a small one is for a quick look only."""
LOGPROB_TOLERANCE = 2e-4
"""How near float32 has log-probabilities of the same tokens computed in other chunks."""
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Lima"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


@dataclass
class Job:
    """A request of the mix: when it comes, what it asks, and after how many of its tokens its client goes away."""

    name: str
    step: int
    prompt: list[int]
    parameters: SamplingParams
    abort_after: int | None = None
    """0: a step after it came, whatever it had by then."""


def mixed_jobs(seed: int = 1) -> list[Job]:
    """Shared prefixes, seeds, log-probabilities, penalties, structured output, n > 1, stop strings, aborts at every stage."""
    rng = random.Random(seed)
    shared = [rng.randrange(3, 4000) for _ in range(900)]
    jobs = []
    for number in range(JOBS):
        tail = [rng.randrange(3, 4000) for _ in range(rng.randint(5, 300))]
        prompt = shared[: rng.choice((0, 0, 260, 900))] + tail
        given: dict[str, Any] = {
            "max_tokens": rng.randint(20, 120),
            "ignore_eos": True,
            "temperature": 0.0,
            "logprobs": 1,
        }
        match number % 8:
            case 1:
                given |= {"temperature": 0.9, "seed": number, "top_p": 0.9}
            case 2:
                given |= {"logprobs": 3}
            case 3:
                given |= {"repetition_penalty": 1.2, "presence_penalty": 0.3}
            case 4:
                given |= {
                    "structured_outputs": StructuredOutputsParams(json=SCHEMA),
                    "ignore_eos": False,
                    "max_tokens": 120,
                }
            case 6:
                given |= {"n": 2, "temperature": 0.8, "seed": number}
            case 7:
                given |= {"stop": ["e", "a"], "repetition_penalty": 1.3, "max_tokens": 40}
        abort_after = rng.choice((0, 0, 1, 4, 9)) if number % 8 == 5 and number > 8 else None
        jobs.append(Job(f"job-{number}", number, prompt, SamplingParams(**given), abort_after))
    return jobs


@dataclass
class Completion:
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[dict[int, float]] = field(default_factory=list)
    stopped_by: Any = None


Answers = dict[str, dict[int, Completion]]
"""By request, and by index of the completion."""


def run_jobs(llm: LLM, jobs: list[Job], meanwhile: Any = lambda step: None) -> Answers:
    """Feeds the jobs to the engine step by step; aborted ones answer with what they had; `meanwhile(step)` is called
    before every step."""
    engine = llm.llm_engine
    todo = sorted(jobs, key=lambda job: job.step)
    by_name = {job.name: job for job in jobs}
    answers: Answers = {}
    step = 0
    while todo or engine.has_unfinished_requests():
        meanwhile(step)
        leaving = []
        while todo and todo[0].step <= step:
            job = todo.pop(0)
            answers[job.name] = {}
            engine.add_request(job.name, {"prompt_token_ids": job.prompt}, job.parameters)
            if job.abort_after == 0:
                leaving.append(job.name)
        for output in engine.step():
            for one in output.outputs:
                logprobs = [
                    {token: entry.logprob for token, entry in position.items()} for position in one.logprobs or []
                ]
                answers[output.request_id][one.index] = Completion(
                    list(one.token_ids), one.text, logprobs, one.stop_reason
                )
            job = by_name[output.request_id]
            if job.abort_after and len(output.outputs[0].token_ids) >= job.abort_after:
                leaving.append(job.name)
        if leaving:
            engine.abort_request(leaving)
        step += 1
    return answers


def differences(jobs: list[Job], reference: Answers, answers: Answers) -> list[str]:
    """What is not as stock has it: tokens, texts, reasons to stop, log-probabilities; of aborted jobs the part both have."""
    found = []
    for job in jobs:
        stock, ours = reference[job.name], answers[job.name]
        if job.abort_after is None and stock.keys() != ours.keys():
            found.append(f"{job.name}: completions {sorted(stock)} and {sorted(ours)}")
        for index in stock.keys() & ours.keys():
            a, b = stock[index], ours[index]
            length = len(a.tokens) if job.abort_after is None else min(len(a.tokens), len(b.tokens))
            if a.tokens[:length] != b.tokens[: length or None]:
                found.append(f"{job.name}/{index}: tokens differ")
                continue
            if job.abort_after is None and (a.text, a.stopped_by) != (b.text, b.stopped_by):
                found.append(f"{job.name}/{index}: text or reason to stop differ")
            for at, (x, y) in enumerate(zip(a.logprobs[:length], b.logprobs[:length], strict=True)):
                if logprobs_differ(x, y):
                    found.append(f"{job.name}/{index}: log-probabilities of token {at} differ")
                    break
    return found


def logprobs_differ(x: dict[int, float], y: dict[int, float]) -> bool:
    """Of one position: whether a token, or a rank, has another log-probability. Which of two equal tokens is in may differ."""
    pairs = [(x[token], y[token]) for token in x.keys() & y.keys()]
    pairs += zip(sorted(x.values(), reverse=True), sorted(y.values(), reverse=True), strict=False)
    return any(abs(a - b) > LOGPROB_TOLERANCE for a, b in pairs)


def cold_jobs() -> list[Job]:
    """A stream, and two long prompts that come while it decodes."""
    stream = Job("stream", 0, [11] * 40, SamplingParams(max_tokens=90, ignore_eos=True, temperature=0, logprobs=1))
    parameters = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0, logprobs=1)
    return [stream, *(Job(f"cold-{n}", 5, long_prompt(n, 1100), parameters) for n in range(2))]


def long_prompt(number: int, tokens: int) -> list[int]:
    return [(number * 977 + i * 31) % 3900 + 5 for i in range(tokens)]


def make_llm(toy_model: Path, ours: dict[str, Any] | None, blocks: int = BLOCKS, **given: Any) -> LLM:
    """An engine in this process, in float32; `ours` are the options of our scheduler, None is stock vLLM."""
    if ours is not None:
        given |= {"scheduler_cls": "vllm_agentserve.AgentScheduler", "additional_config": {"agentserve": ours}}
    return LLM(
        str(toy_model),
        dtype="float32",
        max_model_len=4096,
        max_num_seqs=16,
        max_num_batched_tokens=16384,
        num_gpu_blocks_override=blocks,
        kv_cache_memory_bytes=1 << 30,
        **({"enforce_eager": True} | given),
    )


def scheduler_of(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def close(llm: LLM) -> None:
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
