"""A mix of requests that leaves nothing out, and an engine to run it in."""

import gc
import os
import random
from pathlib import Path
from typing import Any

from vllm import LLM
from vllm.sampling_params import StructuredOutputsParams

from vllm_agentserve.gpucheck import scripted_requests
from vllm_agentserve.gpucheck.scripted_requests import Completions, ScriptedRequest, long_prompt

BLOCKS = 33
"""KV blocks of 128 tokens: far too few for the mix, so that sequences are preempted."""
REQUESTS = int(os.environ.get("AGENTSERVE_MIX", "208"))
"""Requests of the mix; a small one is for a quick look only."""
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Lima"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def mixed_requests(seed: int = 1) -> list[ScriptedRequest]:
    """Shared prefixes, seeds, log-probabilities, penalties, structured output, n > 1, stop strings, aborts at every stage."""
    rng = random.Random(seed)
    shared = [rng.randrange(3, 4000) for _ in range(900)]
    requests = []
    for number in range(REQUESTS):
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
        requests.append(ScriptedRequest(f"request-{number}", number, prompt, given, abort_after))
    return requests


def greedy(max_tokens: int, **more: Any) -> dict[str, Any]:
    """Parameters of a greedy answer of exactly so many tokens, with log-probabilities and text."""
    return scripted_requests.greedy(max_tokens, logprobs=1, detokenize=True) | more


def run_requests(llm: LLM, requests: list[ScriptedRequest], before_step: Any = lambda step: None) -> Completions:
    """As `scripted_requests.run_requests`."""
    return scripted_requests.run_requests(llm.llm_engine, requests, before_step=before_step)


def cold_requests() -> list[ScriptedRequest]:
    """A stream, and two long prompts that come while it decodes."""
    stream = ScriptedRequest("stream", 0, [11] * 40, greedy(90))
    return [stream, *(ScriptedRequest(f"cold-{n}", 5, long_prompt(n, 1100), greedy(12)) for n in range(2))]


def make_llm(toy_model: Path, ours: dict[str, Any] | None, blocks: int = BLOCKS, **given: Any) -> LLM:
    """An engine in this process, in float32; `ours` are the options of our scheduler, None is stock vLLM. Only engines with
    `warm_up_s` warm up, which would take longer than most tests."""
    if ours is not None:
        ours = {"warm_up_s": 0} | ours
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
