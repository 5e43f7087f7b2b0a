"""Mode `lanes` in a real engine, in float32: the same answers as stock vLLM, whatever becomes of the lane on the way."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mix import (
    Answers,
    Job,
    close,
    cold_jobs,
    differences,
    long_prompt,
    make_llm,
    mixed_jobs,
    run_jobs,
    scheduler_of,
)
from vllm import LLM, SamplingParams
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.engine.arg_utils import EngineArgs

from vllm_agentserve import plugin
from vllm_agentserve.bench.server import has_nvidia_driver
from vllm_agentserve.config import OptionError
from vllm_agentserve.lanes import process
from vllm_agentserve.lanes.dispatch import LaneDispatch
from vllm_agentserve.lanes.process import ProcessLane
from vllm_agentserve.lanes.worker import LaneWorker

KILLS = int(os.environ.get("AGENTSERVE_LANE_KILLS", "2"))
"""How often the lane is killed under load: `make torture` says 50, each takes as long as a lane takes to start."""
LANES = {
    "mode": "lanes",
    "tpot_slo_ms": 30,
    "lane_min_tokens": 48,
    "lane_chunk_tokens": 64,
    "lane_restarts": 3 + KILLS,
}
lanes_run_here = pytest.mark.skipif(
    has_nvidia_driver() or len(os.sched_getaffinity(0)) < 2, reason="needs a CPU build of vLLM and two cores"
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


@pytest.fixture(scope="module")
def lanes(toy_model: Path, stock: Answers) -> Iterator[LLM]:
    llm = make_llm(toy_model, LANES)
    yield llm
    close(llm)


@pytest.fixture(scope="module")
def answers(lanes: LLM) -> Answers:
    return run_jobs(lanes, mixed_jobs())


def worker() -> LaneWorker:
    return get_kv_transfer_group().half


def counts(llm: LLM) -> dict[str, int]:
    return dict(scheduler_of(llm)._stats.counts)


def run_cold(llm: LLM, meanwhile: Any = lambda step: None, jobs: list[Job] | None = None) -> Answers:
    """Runs `cold_jobs()`, or others, from an empty prefix cache."""
    assert scheduler_of(llm).reset_prefix_cache()
    return run_jobs(llm, jobs or cold_jobs(), meanwhile)


def wrong(stock: Answers, answers: Answers) -> list[str]:
    return differences(cold_jobs(), stock, answers)


def lane_is_idle(llm: LLM) -> None:
    """Steps an engine without requests until the lane has let go of everything."""
    deadline = time.monotonic() + 30
    while scheduler_of(llm)._lane.busy and time.monotonic() < deadline:
        llm.llm_engine.step()
    assert not worker()._lane.busy


def lane_is_up(llm: LLM) -> None:
    """Waits until a lane that was started again is ready, and lets the policy use it at once."""
    lane = worker()._lane
    if not lane.ready:
        lane.wait_until_ready()
    scheduler_of(llm)._lane.policy.started()


@lanes_run_here
def test_answers_equal_stock(lanes: LLM, stock: Answers, answers: Answers) -> None:
    assert differences(mixed_jobs(), stock, answers) == []
    done = counts(lanes)
    assert done["lane_requests"] > 100
    assert done["steps_beside_lane"] > 100
    assert done["lane_failed_requests"] == 0


@lanes_run_here
def test_nothing_is_left_behind(lanes: LLM, answers: Answers) -> None:
    lane_is_idle(lanes)
    scheduler = scheduler_of(lanes)
    assert not scheduler.requests
    assert not scheduler._from_lane
    assert not scheduler._lane.reasons
    assert not scheduler._lane._filling
    assert scheduler.kv_cache_manager.usage == 0.0


@lanes_run_here
def test_decode_goes_on_while_the_lane_works(lanes: LLM, stock: Answers) -> None:
    busy = []
    before = counts(lanes)
    assert wrong(stock, run_cold(lanes, lambda step: busy.append(worker()._lane.busy))) == []
    done = {name: count - before[name] for name, count in counts(lanes).items()}
    assert (done["lane_requests"], done["lane_tokens"], done["cold_prefill_requests"]) == (2, 2 * 1099, 3)
    assert sum(busy) > 10
    assert scheduler_of(lanes)._lane.tokens_per_s > 0


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
@pytest.mark.parametrize("steps", [0, 1, 2, 4, 8])
def test_aborts_at_every_stage_leave_nothing_behind(lanes: LLM, steps: int) -> None:
    def meanwhile(step: int) -> None:
        if step == 5 + steps:
            lanes.llm_engine.abort_request(["cold-0", "cold-1"])

    run_cold(lanes, meanwhile)
    lane_is_idle(lanes)
    scheduler = scheduler_of(lanes)
    assert not scheduler._lane._filling
    assert not scheduler.requests
    assert scheduler.kv_cache_manager.usage == 0.0


@lanes_run_here
def test_the_cache_is_reset_while_the_lane_works(lanes: LLM, stock: Answers) -> None:
    taken_back = []

    def meanwhile(step: int) -> None:
        if step in (7, 9):
            taken_back.append(scheduler_of(lanes)._lane.busy)
            assert scheduler_of(lanes).reset_prefix_cache(reset_running_requests=True)

    assert wrong(stock, run_cold(lanes, meanwhile)) == []
    assert any(taken_back)


# Faults


@lanes_run_here
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lane_that_dies_or_hangs_costs_nothing_but_time(
    lanes: LLM, stock: Answers, kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, or stopped until the watchdog ends it: its prompts are computed again, and another lane is started."""
    lane_is_up(lanes)
    if kind == signal.SIGSTOP:
        monkeypatch.setattr(process, "CHUNK_TIMEOUT_S", 3.0)
    before = counts(lanes)
    restarts, old = worker().restarts, worker()._lane.pid
    assert wrong(stock, run_cold(lanes, lambda step: os.kill(old, kind) if step == 7 else None)) == []
    assert counts(lanes)["lane_failed_requests"] - before["lane_failed_requests"] == 2
    assert worker().restarts == restarts + 1
    assert worker()._lane.pid != old
    monkeypatch.undo()
    lane_is_up(lanes)
    assert wrong(stock, run_cold(lanes)) == []
    assert counts(lanes)["lane_requests"] - before["lane_requests"] == 4


@lanes_run_here
def test_a_chunk_that_fails_costs_its_prompt_nothing_but_time(
    lanes: LLM, stock: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job whose tokens are no tokens raises in the lane, which ends: another one is started."""
    dispatch = LaneDispatch.dispatch

    def spoil(self: LaneDispatch, request: Any, blocks: tuple[list[int], ...], tokens: int) -> None:
        dispatch(self, request, blocks, tokens)
        if request.request_id.startswith("cold-0"):
            self._new[-1] = replace(self._new[-1], token_ids=["no token"] * request.num_tokens)

    monkeypatch.setattr(LaneDispatch, "dispatch", spoil)
    before, pid = counts(lanes), worker()._lane.pid
    assert wrong(stock, run_cold(lanes)) == []
    assert counts(lanes)["lane_failed_requests"] - before["lane_failed_requests"] == 2
    assert worker()._lane.pid != pid
    monkeypatch.undo()
    lane_is_up(lanes)
    assert wrong(stock, run_cold(lanes)) == []
    assert counts(lanes)["lane_requests"] - before["lane_requests"] == 4


@lanes_run_here
def test_killed_again_and_again_under_load(lanes: LLM, stock: Answers) -> None:
    """Half of the mix runs while the lane is killed at a random step; then the next lane is waited for."""
    jobs = [job for job in mixed_jobs() if int(job.name[4:]) < 48]
    for number in range(KILLS):
        at, pid = 20 + 7 * number % 60, worker()._lane.pid
        before = counts(lanes)["lane_requests"]
        found = run_cold(lanes, lambda step, at=at, pid=pid: os.kill(pid, signal.SIGKILL) if step == at else None, jobs)
        assert differences(jobs, stock, found) == [], f"kill {number} at step {at}"
        assert counts(lanes)["lane_requests"] > before
        assert scheduler_of(lanes).kv_cache_manager.usage == 0.0
        for _ in range(3):  # the death may be noticed without a job, when the engine next looks
            lanes.llm_engine.step()
        assert worker()._lane.pid != pid
        lane_is_up(lanes)


# Planted bugs: the comparisons above have teeth


@lanes_run_here
def test_a_lane_that_starts_a_token_too_late_would_be_noticed(
    lanes: LLM, stock: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatch = LaneDispatch.dispatch
    monkeypatch.setattr(
        LaneDispatch, "dispatch", lambda self, request, blocks, tokens: dispatch(self, request, blocks, tokens - 1)
    )
    assert wrong(stock, run_cold(lanes)) != []


@lanes_run_here
def test_blocks_published_before_they_are_written_would_be_noticed(
    lanes: LLM, stock: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker says that a job is done when it has only been submitted."""
    after_step, told = LaneWorker.after_step, set()

    def hasty(self: LaneWorker, finished: set[str]) -> KVConnectorTransferResults:
        after_step(self, finished)
        new = set(self._lane.jobs()) - told
        told.update(new)
        return KVConnectorTransferResults(finished_recving=new)

    monkeypatch.setattr(LaneWorker, "after_step", hasty)
    assert wrong(stock, run_cold(lanes)) != []
    while worker()._lane.busy:
        worker()._lane.poll(0.1)


@lanes_run_here
def test_blocks_freed_while_they_are_written_would_be_noticed(lanes: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """An aborted job's blocks are given back at once, and the lane writes on into what others have in them by then."""
    parameters = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0, logprobs=1)
    stream = Job("stream", 0, [11] * 40, SamplingParams(max_tokens=150, ignore_eos=True, temperature=0))
    aborted = Job("aborted", 2, long_prompt(5, 3900), parameters, abort_after=0)
    # Short enough for vLLM's own steps, and so many that they get the blocks that were given back.
    others = [Job(f"other-{n}", 4, long_prompt(20 + n, 47), parameters) for n in range(14)]
    right = run_cold(lanes, jobs=[stream, *others])

    def cancel(self: ProcessLane, request_id: str) -> None:
        if request_id in self._in_flight:
            self._in_flight.discard(request_id)
            freed.add(request_id)
            given_back.append(request_id)

    after_step, freed, given_back = LaneWorker.after_step, set[str](), list[str]()

    def hasty(self: LaneWorker, finished: set[str]) -> KVConnectorTransferResults:
        results = after_step(self, finished)
        done = (results.finished_recving or set()) | freed
        freed.clear()
        return KVConnectorTransferResults(finished_recving=done)

    monkeypatch.setattr(ProcessLane, "cancel", cancel)
    monkeypatch.setattr(LaneWorker, "after_step", hasty)
    found = run_cold(lanes, jobs=[stream, aborted, *others])
    assert differences(others, right, found) != []
    monkeypatch.undo()
    deadline = time.monotonic() + 30
    lane = worker()._lane
    lane._in_flight |= set(given_back)
    while lane.busy and time.monotonic() < deadline:
        lane.poll(0.1)
    assert not lane.busy


@lanes_run_here
def test_a_lane_that_dies_too_often_is_given_up(lanes: LLM, stock: Answers) -> None:
    """Runs last: afterwards the engine is time-sliced."""
    worker().restarts = LANES["lane_restarts"]
    pid = worker()._lane.pid
    assert wrong(stock, run_cold(lanes, lambda step: os.kill(pid, signal.SIGKILL) if step == 7 else None)) == []
    assert worker()._lane is None
    before = counts(lanes)
    assert wrong(stock, run_cold(lanes)) == []
    done = {name: count - before[name] for name, count in counts(lanes).items()}
    assert (done["lane_requests"], done["step_lane_down_requests"]) == (0, 2)


@lanes_run_here
def test_a_killed_engine_takes_its_lane_along(toy_model: Path) -> None:
    code = (
        "from mix import make_llm\n"
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
