"""Control calls while prompts are in the lane of an engine whose worker is a process of its own, as under `vllm serve`."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.lane_engine import lanes_run_here
from tests.support.paths import ROOT

CHECK = """
import json, sys
from pathlib import Path
from vllm import LLM, SamplingParams

def said(call, *given):
    try:
        return core.call_utility(call, *given)
    except Exception as error:
        return str(error)

def add(name, tokens, answer):
    prompt = {"prompt_token_ids": [3 + (len(name) * 7919 + i) % 4000 for i in range(tokens)]}
    engine.add_request(name, prompt, SamplingParams(max_tokens=answer, ignore_eos=True, temperature=0))

def steps(count=None):
    while engine.has_unfinished_requests() and count != 0:
        count = count and count - 1
        for output in engine.step():
            answers[output.request_id] = list(output.outputs[0].token_ids)

if __name__ == "__main__":
    options = {"mode": "lanes", "lane_min_tokens": 48, "lane_chunk_tokens": 64, "tpot_slo_ms": 30, "warm_up_s": 0}
    llm = LLM(sys.argv[1], dtype="float32", max_model_len=8192, max_num_seqs=8, max_num_batched_tokens=8192,
        kv_cache_memory_bytes=1 << 29, enforce_eager=True, scheduler_cls="vllm_agentserve.AgentScheduler",
        additional_config={"agentserve": options})
    engine, answers, results = llm.llm_engine, {}, {}
    core = engine.engine_core
    for interrupted in (True, False):
        add("stream", 30, 300)
        steps(5)
        add("prompt", 7000, 4)
        steps(5)
        if interrupted:
            results["early"] = "prompt" in answers
            results["sleep"] = said("sleep", 1, "keep")
            results["awake"] = not core.call_utility("is_scheduler_paused")
            results["pause"] = said("pause_scheduler", "keep", True)
            results["paused"] = core.call_utility("is_scheduler_paused")
            core.call_utility("resume_scheduler")
        steps()
        results[f"answers {interrupted}"], answers = answers, {}
        core.call_utility("reset_prefix_cache", False, False)
    Path(sys.argv[2]).write_text(json.dumps(results))
"""


@lanes_run_here
def test_a_pause_takes_the_prompt_back_and_sleep_is_refused_before_it_pauses(toy_model: Path, tmp_path: Path) -> None:
    script, written = tmp_path / "check.py", tmp_path / "results.json"
    script.write_text(CHECK)
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(toy_model), str(written)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(written.read_text())
    assert (results["early"], results["awake"], results["pause"], results["paused"]) == (False, True, None, True)
    assert "sleep is refused" in results["sleep"]
    assert results["answers True"] == results["answers False"]
    assert {name: len(tokens) for name, tokens in results["answers True"].items()} == {"stream": 300, "prompt": 4}
