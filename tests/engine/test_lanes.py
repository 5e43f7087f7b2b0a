"""Mode `lanes` in a real engine, in float32: the same answers as stock vLLM."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs

from tests.support.lane_engine import LANES, counts, lane_is_idle, lanes_run_here, run_cold, worker, wrong
from tests.support.mix import (
    close,
    greedy,
    make_llm,
    mixed_requests,
    run_requests,
    scheduler_of,
)
from tests.support.paths import ROOT
from vllm_agentserve import plugin
from vllm_agentserve.config import OptionError
from vllm_agentserve.gpucheck.compare import differences
from vllm_agentserve.gpucheck.scripted_requests import Completions, ScriptedRequest, long_prompt
from vllm_agentserve.policy.step_sizes import StepSize

# Start-up


@lanes_run_here
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size is 2"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size is 2"),
        ({"enable_lora": True}, "LoRA is on"),
        ({"enable_prefix_caching": False}, "prefix caching is off"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding is on"),
    ],
)
def test_lanes_that_cannot_run_are_refused_with_the_reason(toy_model: Path, given: dict, words: str) -> None:
    plugin.register()
    arguments = EngineArgs(
        str(toy_model),
        scheduler_cls="vllm_agentserve.AgentScheduler",
        additional_config={"agentserve": {"mode": "lanes"}},
        **given,
    )
    with pytest.raises(OptionError, match="'mode' = 'lanes' cannot run here: .*" + words + ".*Use 'auto'"):
        arguments.create_engine_config()


def test_other_modes_get_no_connector(toy_model: Path) -> None:
    plugin.register()
    for options in ({}, {"mode": "time-sliced"}):
        arguments = EngineArgs(
            str(toy_model),
            scheduler_cls="vllm_agentserve.AgentScheduler",
            additional_config={"agentserve": options},
            max_model_len=4096,
        )
        assert arguments.create_engine_config().kv_transfer_config is None


# The engine


@pytest.fixture(scope="module")
def lanes(toy_model: Path, stock: Completions) -> Iterator[LLM]:
    llm = make_llm(toy_model, LANES | {"warm_up_s": 3})
    yield llm
    close(llm)


@pytest.fixture(scope="module")
def answers(lanes: LLM) -> Completions:
    return run_requests(lanes, mixed_requests())


@lanes_run_here
def test_small_steps_have_their_kernels_on_all_threads_before_any_runs_beside_the_lane(lanes: LLM) -> None:
    warmed_up = lanes.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.warmed_up
    assert warmed_up[:8] == tuple(range(1, 9))
    kernels = worker()._provider._kernels
    assert all(kernels.use(StepSize(tokens, tokens)) for tokens in range(1, 9))
    assert not kernels.use(StepSize(max(kernels._grid), 0))


@lanes_run_here
def test_answers_equal_stock(lanes: LLM, stock: Completions, answers: Completions) -> None:
    assert differences(mixed_requests(), stock, answers) == []
    done = counts(lanes)
    assert done["lane_requests"] > 100
    assert done["lane_overlapped_steps"] > 100
    assert done["lane_failed_requests"] == 0


@lanes_run_here
def test_nothing_is_left_behind(lanes: LLM, answers: Completions) -> None:
    lane_is_idle(lanes)
    scheduler = scheduler_of(lanes)
    assert not scheduler.requests
    assert not scheduler.calls
    assert not scheduler._lane.dispatch.filling
    assert scheduler.kv_cache_manager.usage == 0.0


@lanes_run_here
def test_decode_goes_on_while_the_lane_works(lanes: LLM, stock: Completions) -> None:
    busy = []
    before = counts(lanes)
    assert wrong(stock, run_cold(lanes, lambda step: busy.append(worker()._lane.busy))) == []
    done = {name: count - before.get(name, 0.0) for name, count in counts(lanes).items()}
    assert (done["lane_requests"], done["lane_tokens"], done["cold_prefill_requests"]) == (2, 2 * 1099, 3)
    assert sum(busy) > 10
    assert scheduler_of(lanes)._lane.dispatch.tokens_per_s > 0


@lanes_run_here
def test_the_same_cold_prompt_twice_is_computed_once(lanes: LLM) -> None:
    assert scheduler_of(lanes).reset_prefix_cache()
    engine = lanes.llm_engine
    prompt = long_prompt(7, 1000)
    plain = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0)
    before = counts(lanes)["lane_tokens"]
    engine.add_request(
        "s", {"prompt_token_ids": [11] * 40}, SamplingParams(max_tokens=150, ignore_eos=True, temperature=0)
    )
    for _ in range(5):
        engine.step()
    cached, tokens = {}, {}
    for name in ("one", "two"):
        engine.add_request(name, {"prompt_token_ids": prompt}, plain)
    while engine.has_unfinished_requests():
        for output in engine.step():
            cached[output.request_id] = output.num_cached_tokens
            tokens[output.request_id] = list(output.outputs[0].token_ids)
    assert tokens["one"] == tokens["two"]
    # What the lane computes is not "cached" for the first; the second finds its seven whole blocks of 128 in the cache.
    assert (cached["one"], cached["two"]) == (0, 896)
    # Its remaining 103 go to the lane too, unless the stream has ended by then.
    assert counts(lanes)["lane_tokens"] - before in (999, 999 + 103)


@lanes_run_here
def test_a_prompt_reads_no_block_that_the_same_step_is_to_write(lanes: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short prompt, for a step, and a long one with the same beginning, for the lane, come together. The reference is the same
    engine without its lane; the prompt is asked for again, too, since a wrong block would stay in the prefix cache."""
    shared, plain = [], greedy(6)
    for number in range(4):
        start = long_prompt(40 + number, 256)
        stream = ScriptedRequest("s", 0, [11] * 40, greedy(40, logprobs=None))
        short = ScriptedRequest("short", 4, start + long_prompt(50 + number, 20), plain)
        long = ScriptedRequest("long", 4, start + long_prompt(60 + number, 400), plain)
        shared.append([stream, short, long, ScriptedRequest("again", 60, long.prompt, plain)])
    # Or a step would fill no whole block.
    monkeypatch.setattr(scheduler_of(lanes).engine_policy, "cuts", False)
    policy = scheduler_of(lanes)._lane.dispatch.policy
    monkeypatch.setattr(policy, "min_tokens", 300)
    policy.ready = False
    reference = [run_cold(lanes, requests=requests) for requests in shared]
    policy.ready = True
    before = counts(lanes)["lane_requests"]
    for requests, right in zip(shared, reference, strict=True):
        assert differences(requests, right, run_cold(lanes, requests=requests)) == []
    assert counts(lanes)["lane_requests"] - before >= 4


@lanes_run_here
@pytest.mark.parametrize("steps", [0, 1, 2, 4, 8])
def test_aborts_at_every_stage_leave_nothing_behind(lanes: LLM, steps: int) -> None:
    def before_step(step: int) -> None:
        if step == 5 + steps:
            lanes.llm_engine.abort_request(["cold-0", "cold-1"])

    run_cold(lanes, before_step)
    lane_is_idle(lanes)
    scheduler = scheduler_of(lanes)
    assert not scheduler._lane.dispatch.filling
    assert not scheduler.requests
    assert scheduler.kv_cache_manager.usage == 0.0


@lanes_run_here
def test_the_cache_is_reset_while_the_lane_works(lanes: LLM, stock: Completions) -> None:
    taken_back = []

    def before_step(step: int) -> None:
        if step in (7, 9):
            taken_back.append(scheduler_of(lanes)._lane.busy)
            assert scheduler_of(lanes).reset_prefix_cache(reset_running_requests=True)

    assert wrong(stock, run_cold(lanes, before_step)) == []
    assert any(taken_back)


@lanes_run_here
def test_a_killed_engine_takes_its_lane_along(toy_model: Path) -> None:
    code = (
        "from tests.support.mix import make_llm\n"
        "from pathlib import Path\n"
        f"llm = make_llm(Path({str(toy_model)!r}), {LANES!r})\n"
        "from vllm.distributed.kv_transfer import get_kv_transfer_group\n"
        "print('lane', get_kv_transfer_group().half._lane.pid, flush=True)\n"
        "import time; time.sleep(600)\n"
    )
    engine = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert engine.stdout is not None
    pid = next(int(line.split()[1]) for line in engine.stdout if line.startswith("lane "))
    assert Path(f"/proc/{pid}").exists()
    engine.kill()
    engine.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
