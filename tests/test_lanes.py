"""Mode `lanes` in a real engine, in float32: the same tokens as stock vLLM, whatever becomes of the lane on the way."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_engine import Answer, Job, close, make_llm, mixed_jobs, run_jobs, scheduler_of
from vllm import LLM, SamplingParams
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.engine.arg_utils import EngineArgs

from vllm_agentserve import plugin
from vllm_agentserve.bench.server import has_nvidia_driver
from vllm_agentserve.config import OptionError
from vllm_agentserve.lanes import process
from vllm_agentserve.lanes.dispatch import LaneDispatch
from vllm_agentserve.lanes.worker import LaneWorker

LOGPROB_TOLERANCE = 2e-4
LANES = {"mode": "lanes", "tpot_slo_ms": 30, "lane_min_tokens": 48, "lane_chunk_tokens": 64, "lane_restarts": 2}


lanes_run_here = pytest.mark.skipif(
    has_nvidia_driver() or len(os.sched_getaffinity(0)) < 2, reason="lanes need a CPU build of vLLM and two cores"
)


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

COLD: "Told" = {}
"""What stock answers to `cold_jobs`."""


@pytest.fixture(scope="module")
def reference(toy_model: Path) -> dict[str, Answer]:
    """Stock's answers to the mix of `test_engine`, and to `cold_jobs`."""
    llm = make_llm(toy_model, None)
    answers = run_jobs(llm, mixed_jobs())
    COLD.update(run_cold(llm))
    close(llm)
    return answers


@pytest.fixture(scope="module")
def lanes(toy_model: Path, reference: dict[str, Answer]) -> Iterator[LLM]:
    llm = make_llm(toy_model, LANES)
    yield llm
    close(llm)


@pytest.fixture(scope="module")
def answers(lanes: LLM) -> dict[str, Answer]:
    return run_jobs(lanes, mixed_jobs())


def cold_jobs() -> list[Job]:
    """A stream, and two prompts that come while it decodes."""
    stream = Job("stream", 0, [11] * 40, SamplingParams(max_tokens=90, ignore_eos=True, temperature=0, logprobs=1))
    parameters = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0, logprobs=1)
    prompts = [[(n * 977 + i * 31) % 3900 + 5 for i in range(1100)] for n in range(2)]
    colds = [Job(f"cold-{n}", 5, prompt, parameters) for n, prompt in enumerate(prompts)]
    return [stream, *colds]


def worker() -> LaneWorker:
    return get_kv_transfer_group().half


def counts(llm: LLM) -> dict[str, int]:
    return scheduler_of(llm)._stats.counts


Told = dict[str, list[tuple[int, float]]]
"""By request: every token with its log-probability, which shows what a repetitive toy model's tokens do not."""


def told(completion: Any) -> list[tuple[int, float]]:
    return [
        (token, position[token].logprob)
        for token, position in zip(completion.token_ids, completion.logprobs, strict=True)
    ]


def run_cold(llm: LLM, meanwhile: Any = lambda step: None) -> Told:
    """Runs `cold_jobs` from an empty prefix cache; `meanwhile(step)` is called before every step."""
    scheduler = scheduler_of(llm)
    assert scheduler.reset_prefix_cache()
    engine = llm.llm_engine
    todo, answered, step = cold_jobs(), {}, 0
    while todo or engine.has_unfinished_requests():
        while todo and todo[0].step <= step:
            job = todo.pop(0)
            engine.add_request(job.name, {"prompt_token_ids": job.prompt}, job.parameters)
        meanwhile(step)
        for output in engine.step():
            answered[output.request_id] = told(output.outputs[0])
        step += 1
    return answered


def equal(one: Told, other: Told) -> bool:
    """The same tokens, and log-probabilities as near as float32 has them in whatever chunks."""
    if {name: [token for token, _ in tokens] for name, tokens in one.items()} != {
        name: [token for token, _ in tokens] for name, tokens in other.items()
    }:
        return False
    return all(
        abs(a - b) < LOGPROB_TOLERANCE
        for name, tokens in one.items()
        for (_, a), (_, b) in zip(tokens, other[name], strict=True)
    )


@lanes_run_here
def test_the_lane_had_much_to_do(lanes: LLM, answers: dict[str, Answer]) -> None:
    assert counts(lanes)["lane_requests"] >= 15
    assert counts(lanes)["lane_failed_requests"] == 0


@lanes_run_here
@pytest.mark.parametrize("name", [job.name for job in mixed_jobs() if job.abort_after is None])
def test_tokens_equal_stock(name: str, reference: dict[str, Answer], answers: dict[str, Answer]) -> None:
    assert answers[name].tokens == reference[name].tokens


@lanes_run_here
def test_log_probabilities_equal_stock(reference: dict[str, Answer], answers: dict[str, Answer]) -> None:
    names = [job.name for job in mixed_jobs() if job.abort_after is None]
    for name in names:
        for ours_at, stock_at in zip(answers[name].logprobs, reference[name].logprobs, strict=True):
            assert ours_at == pytest.approx(stock_at, abs=2e-4)
    assert len(names) > 20


@lanes_run_here
def test_decode_goes_on_while_the_lane_works(
    lanes: LLM, answers: dict[str, Answer], reference: dict[str, Answer]
) -> None:
    busy = []
    before = dict(counts(lanes))
    tokens = run_cold(lanes, lambda step: busy.append(worker()._lane.busy))
    assert equal(tokens, COLD)
    assert counts(lanes)["lane_requests"] - before["lane_requests"] == 2
    assert counts(lanes)["lane_tokens"] - before["lane_tokens"] == 2 * 1099
    assert sum(busy) > 10
    assert counts(lanes)["cold_prefill_requests"] - before["cold_prefill_requests"] == 3


@lanes_run_here
def test_the_same_cold_prompt_twice_is_computed_once(lanes: LLM, answers: dict[str, Answer]) -> None:
    assert scheduler_of(lanes).reset_prefix_cache()
    engine = lanes.llm_engine
    prompt = [(i * 37) % 3900 + 5 for i in range(1000)]
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
@pytest.mark.parametrize("steps", [0, 1, 2, 4, 8])
def test_aborts_at_every_stage_leave_nothing_behind(lanes: LLM, answers: dict[str, Answer], steps: int) -> None:
    engine = lanes.llm_engine

    def meanwhile(step: int) -> None:
        if step == 5 + steps:
            engine.abort_request(["cold-0", "cold-1"])

    run_cold(lanes, meanwhile)
    scheduler = scheduler_of(lanes)
    deadline = time.monotonic() + 30
    while worker()._lane.busy and time.monotonic() < deadline:
        engine.step()
        time.sleep(0.01)
    assert not worker()._lane.busy
    assert not scheduler.connector.half._in_flight
    assert not scheduler.connector.half._filling
    assert not scheduler.requests
    assert not scheduler._from_lane
    assert scheduler.kv_cache_manager.usage == 0.0


def lane_is_up(lanes: LLM) -> None:
    """Waits until a lane that was started again is ready, and lets the policy use it at once."""
    lane = worker()._lane
    if not lane.ready:
        lane.wait_until_ready()
    scheduler_of(lanes).connector.half.policy.started()


@lanes_run_here
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lane_that_dies_or_hangs_costs_nothing_but_time(
    lanes: LLM,
    answers: dict[str, Answer],
    kind: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed, or stopped until the watchdog ends it: its prompts are computed again, and another lane is started."""
    monkeypatch.setattr(process, "CHUNK_TIMEOUT_S", 0.5)
    before = dict(counts(lanes))
    restarts = worker().restarts
    old = worker()._lane.pid
    tokens = run_cold(lanes, lambda step: os.kill(old, kind) if step == 7 else None)
    assert equal(tokens, COLD)
    assert counts(lanes)["lane_failed_requests"] - before["lane_failed_requests"] == 2
    assert worker().restarts == restarts + 1
    assert worker()._lane.pid != old
    lane_is_up(lanes)
    assert equal(run_cold(lanes), COLD)
    assert counts(lanes)["lane_requests"] - before["lane_requests"] == 4


@lanes_run_here
def test_a_lane_that_starts_a_token_too_late_would_be_noticed(
    lanes: LLM, answers: dict[str, Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted bug: the comparison of tokens above has teeth."""
    stock = LaneDispatch.dispatch
    monkeypatch.setattr(
        LaneDispatch, "dispatch", lambda self, request, blocks, tokens: stock(self, request, blocks, tokens - 1)
    )
    assert not equal(run_cold(lanes), COLD)


@lanes_run_here
def test_blocks_handed_over_before_they_are_written_would_be_noticed(
    lanes: LLM, answers: dict[str, Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another: the worker says that a job is done when it has only been submitted."""
    stock = LaneWorker.after_step

    def hasty(self: LaneWorker, finished: set[str]) -> KVConnectorTransferResults:
        stock(self, finished)
        return KVConnectorTransferResults(finished_recving=set(self._lane._in_flight))

    monkeypatch.setattr(LaneWorker, "after_step", hasty)
    scheduler = scheduler_of(lanes)
    dispatched: list[str] = []
    monkeypatch.setattr(
        scheduler.connector.half, "on_dispatch", lambda request, start: dispatched.append(request.request_id)
    )

    def once(self: LaneWorker, finished: set[str]) -> KVConnectorTransferResults:
        result = hasty(self, finished)
        early = {name for name in result.finished_recving if name in dispatched}
        for name in early:
            dispatched.remove(name)
        return KVConnectorTransferResults(finished_recving=early)

    monkeypatch.setattr(LaneWorker, "after_step", once)
    assert not equal(run_cold(lanes), COLD)
    deadline = time.monotonic() + 30
    while worker()._lane.busy and time.monotonic() < deadline:
        worker()._lane.poll(0.1)


@lanes_run_here
def test_a_lane_that_dies_too_often_is_given_up(
    lanes: LLM, answers: dict[str, Answer], reference: dict[str, Answer]
) -> None:
    """Runs last: afterwards the engine is time-sliced."""
    assert worker().restarts == LANES["lane_restarts"]
    pid = worker()._lane.pid
    tokens = run_cold(lanes, lambda step: os.kill(pid, signal.SIGKILL) if step == 7 else None)
    assert equal(tokens, COLD)
    assert worker()._lane is None
    before = counts(lanes)["lane_requests"]
    assert equal(run_cold(lanes), COLD)
    assert counts(lanes)["lane_requests"] == before


@lanes_run_here
def test_a_killed_engine_takes_its_lane_along(toy_model: Path) -> None:
    code = (
        "from test_engine import make_llm\n"
        "from pathlib import Path\n"
        f"llm = make_llm(Path({str(toy_model)!r}), {LANES!r})\n"
        "from vllm.distributed.kv_transfer import get_kv_transfer_group\n"
        "print('lane', get_kv_transfer_group().half._lane.pid, flush=True)\n"
        "import time; time.sleep(600)\n"
    )
    engine = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
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
