"""Mode `lanes` when things go wrong: the same answers as stock vLLM, whatever becomes of the lane; and planted bugs."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from tests.support.lane_engine import KILLS, LANES, counts, lane_is_up, lanes_run_here, run_cold, worker, wrong
from tests.support.mix import close, greedy, make_llm, mixed_requests, scheduler_of
from vllm_agentserve.gpucheck.compare import differences
from vllm_agentserve.gpucheck.scripted_requests import Completions, ScriptedRequest, long_prompt
from vllm_agentserve.lanes.connector_scheduler import LaneConnectorScheduler
from vllm_agentserve.lanes.connector_worker import LaneConnectorWorker
from vllm_agentserve.lanes.cpu import process
from vllm_agentserve.lanes.cpu.process import ProcessLane
from vllm_agentserve.lanes.lane import NoLane


@pytest.fixture(scope="module")
def lanes(toy_model: Path, stock: Completions) -> Iterator[LLM]:
    llm = make_llm(toy_model, LANES)
    yield llm
    close(llm)


@lanes_run_here
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lane_that_dies_or_hangs_costs_nothing_but_time(
    lanes: LLM, stock: Completions, kind: int, monkeypatch: pytest.MonkeyPatch
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

    def reset(step: int) -> None:
        """A lane that was started inside a step is waited for outside of one."""
        if step == 7:
            assert scheduler_of(lanes)._lane.busy
            assert scheduler_of(lanes).reset_prefix_cache(reset_running_requests=True)

    assert wrong(stock, run_cold(lanes, reset)) == []


@lanes_run_here
def test_a_chunk_that_fails_costs_its_prompt_nothing_but_time(
    lanes: LLM, stock: Completions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job whose tokens are no tokens raises in the lane, which ends: another one is started."""
    dispatch = LaneConnectorScheduler.dispatch

    def spoil(self: LaneConnectorScheduler, request: Any, blocks: tuple[list[int], ...], tokens: int) -> None:
        dispatch(self, request, blocks, tokens)
        if request.request_id.startswith("cold-0"):
            self._new[-1] = replace(self._new[-1], token_ids=["no token"] * request.num_tokens)

    monkeypatch.setattr(LaneConnectorScheduler, "dispatch", spoil)
    before, pid = counts(lanes), worker()._lane.pid
    assert wrong(stock, run_cold(lanes)) == []
    assert counts(lanes)["lane_failed_requests"] - before["lane_failed_requests"] == 2
    assert worker()._lane.pid != pid
    monkeypatch.undo()
    lane_is_up(lanes)
    assert wrong(stock, run_cold(lanes)) == []
    assert counts(lanes)["lane_requests"] - before["lane_requests"] == 4


@lanes_run_here
def test_killed_again_and_again_under_load(lanes: LLM, stock: Completions) -> None:
    """Half of the mix runs while the lane is killed at a random step; then the next lane is waited for."""
    requests = mixed_requests()[:48]
    for number in range(KILLS):
        at, pid = 20 + 7 * number % 60, worker()._lane.pid
        before = counts(lanes)["lane_requests"]
        found = run_cold(
            lanes, lambda step, at=at, pid=pid: os.kill(pid, signal.SIGKILL) if step == at else None, requests
        )
        assert differences(requests, stock, found) == [], f"kill {number} at step {at}"
        assert counts(lanes)["lane_requests"] > before
        assert scheduler_of(lanes).kv_cache_manager.usage == 0.0
        for _ in range(3):  # the death may be noticed without a job, when the engine next looks
            lanes.llm_engine.step()
        assert worker()._lane.pid != pid
        lane_is_up(lanes)


# Planted bugs: the comparisons above have teeth


@lanes_run_here
def test_a_lane_that_starts_a_token_too_late_would_be_noticed(
    lanes: LLM, stock: Completions, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatch = LaneConnectorScheduler.dispatch
    monkeypatch.setattr(
        LaneConnectorScheduler,
        "dispatch",
        lambda self, request, blocks, tokens: dispatch(self, request, blocks, tokens - 1),
    )
    assert wrong(stock, run_cold(lanes)) != []


@lanes_run_here
def test_blocks_published_before_they_are_written_would_be_noticed(
    lanes: LLM, stock: Completions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker says that a job is done when it has only been submitted."""
    after_step, told = LaneConnectorWorker.after_step, set()

    def hasty(self: LaneConnectorWorker, finished: set[str]) -> KVConnectorTransferResults:
        after_step(self, finished)
        new = set(self._lane.jobs()) - told
        told.update(new)
        return KVConnectorTransferResults(finished_recving=new)

    monkeypatch.setattr(LaneConnectorWorker, "after_step", hasty)
    assert wrong(stock, run_cold(lanes)) != []
    while worker()._lane.busy:
        worker()._lane.poll(0.1)


@lanes_run_here
def test_blocks_freed_while_they_are_written_would_be_noticed(lanes: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """An aborted job's blocks are given back at once, and the lane writes on into what others have in them by then."""
    # They last for as long as the lane writes on, so that it comes upon their blocks.
    parameters = greedy(200)
    stream = ScriptedRequest("stream", 0, [11] * 40, greedy(210, logprobs=None))
    aborted = ScriptedRequest("aborted", 2, long_prompt(5, 3900), parameters, abort_after=0)
    # Short enough for vLLM's own steps, and so many that they get the blocks that were given back.
    others = [ScriptedRequest(f"other-{n}", 4, long_prompt(20 + n, 47), parameters) for n in range(14)]
    right = run_cold(lanes, requests=[stream, *others])

    def cancel(self: ProcessLane, request_id: str) -> None:
        if request_id in self._in_flight:
            self._in_flight.discard(request_id)
            freed.add(request_id)
            given_back.append(request_id)

    after_step, freed, given_back = LaneConnectorWorker.after_step, set[str](), list[str]()

    def hasty(self: LaneConnectorWorker, finished: set[str]) -> KVConnectorTransferResults:
        results = after_step(self, finished)
        done = (results.finished_recving or set()) | freed
        freed.clear()
        return KVConnectorTransferResults(finished_recving=done)

    monkeypatch.setattr(ProcessLane, "cancel", cancel)
    monkeypatch.setattr(LaneConnectorWorker, "after_step", hasty)
    found = run_cold(lanes, requests=[stream, aborted, *others])
    assert differences(others, right, found) != []
    monkeypatch.undo()
    deadline = time.monotonic() + 30
    lane = worker()._lane
    lane._in_flight |= set(given_back)
    while lane.busy and time.monotonic() < deadline:
        lane.poll(0.1)
    assert not lane.busy


@lanes_run_here
def test_a_lane_that_dies_too_often_is_given_up(lanes: LLM, stock: Completions) -> None:
    """Runs last: afterwards the engine is time-sliced."""
    worker().restarts = LANES["lane_restarts"]
    pid = worker()._lane.pid
    assert wrong(stock, run_cold(lanes, lambda step: os.kill(pid, signal.SIGKILL) if step == 7 else None)) == []
    assert isinstance(worker()._lane, NoLane)
    before = counts(lanes)
    assert wrong(stock, run_cold(lanes)) == []
    done = {name: count - before.get(name, 0.0) for name, count in counts(lanes).items()}
    assert (done["lane_requests"], done["step_lane_down_requests"]) == (0, 2)
