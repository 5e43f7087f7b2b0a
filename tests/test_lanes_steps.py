"""The lane's connector on vLLM's real scheduler, without a model: step tables of everything that can become of a prompt.

`LaneDriver` plays the worker and its lane: jobs end when the test says so. Synchronous and asynchronous scheduling.
"""

from types import SimpleNamespace
from typing import Any

import pytest
from schedulers import BLOCK, Driver, make_request, make_scheduler
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

from vllm_agentserve.lanes import dispatch
from vllm_agentserve.lanes.connector import LaneWorkerMetadata
from vllm_agentserve.lanes.lane import Job, LaneReport, Slot

PARKED = RequestStatus.WAITING_FOR_REMOTE_KVS
both = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


class LaneDriver(Driver):
    """A lane whose jobs end when `end()` or `fail()` is called; cancelled ones end with the next step."""

    def __init__(self, scheduler: Any, depth: int = 1) -> None:
        super().__init__(scheduler, depth)
        self.jobs: dict[str, Job] = {}
        self.slots: list[int] = []
        self.report: LaneReport | None = LaneReport((Slot(1, 1),))
        self._ended: set[str] = set()
        self._failed: set[str] = set()

    def end(self, *names: str) -> None:
        self._ended |= set(names)

    def fail(self, *names: str) -> None:
        self._ended |= set(names)
        self._failed |= set(names)

    def transfers(self, output: SchedulerOutput) -> KVConnectorOutput:
        metadata: Any = output.kv_connector_metadata
        self.slots.append(metadata.slot)
        self.jobs |= {job.request_id: job for job in metadata.jobs}
        ended = (self._ended | output.finished_req_ids) & self.jobs.keys()
        failed = self._failed & ended
        for name in ended:
            del self.jobs[name]
        self._ended -= ended
        self._failed -= failed
        said, self.report = self.report, None
        return KVConnectorOutput(
            finished_recving=ended or None,
            failed_recving=failed or None,
            kv_connector_worker_meta=LaneWorkerMetadata(said) if said is not None else None,
        )

    def until(self, name: str, limit: int = 40) -> list[dict[str, int]]:
        """Steps until a row has this request; returns all rows."""
        rows = [self.step()]
        while name not in rows[-1]:
            assert len(rows) < limit, rows
            rows.append(self.step())
        return rows


def started(asynchronous: bool = False, **given: Any) -> tuple[Any, LaneDriver]:
    """A scheduler with lanes and one stream that decodes."""
    options = {"mode": "lanes", "lane_min_tokens": 100, "lane_jobs": 2} | given.pop("options", {})
    scheduler: Any = make_scheduler(asynchronous=asynchronous, options=options, lanes=True, **given)
    driver = LaneDriver(scheduler, depth=2 if asynchronous else 1)
    scheduler.add_request(make_request("stream", 20))
    for _ in range(3):
        driver.step()
    return scheduler, driver


def status(scheduler: Any, name: str) -> RequestStatus:
    return scheduler.requests[name].status


def counts(scheduler: Any) -> dict[str, int]:
    return {name: count for name, count in scheduler._stats.counts.items() if count}


@both
def test_admitted_computed_and_handed_over(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous)
    scheduler.add_request(make_request("cold", 600))
    assert driver.step() == {"stream": 1}
    driver.step()
    assert status(scheduler, "cold") is PARKED
    job = driver.jobs["cold"]
    assert (job.start, job.end, len(job.token_ids), len(job.block_ids[0]), job.resume) == (0, 599, 600, 38, False)
    for _ in range(5):
        assert driver.step() == {"stream": 1}
    driver.end("cold")
    assert driver.until("cold")[-1] == {"stream": 1, "cold": 1}
    assert driver.step() == {"stream": 1, "cold": 1}
    done = counts(scheduler)
    assert (done["lane_requests"], done["lane_tokens"], done["lane_asked_requests"]) == (1, 599, 1)
    assert done["cold_prefill_requests"] == 2
    assert not scheduler._lane.busy


@both
def test_published_only_when_written(asynchronous: bool) -> None:
    """Nobody finds the blocks of a prompt in the prefix cache while the lane fills them."""
    scheduler, driver = started(asynchronous)
    prompt = list(range(40 * BLOCK))
    scheduler.add_request(make_request("cold", prompt))
    driver.step()
    driver.step()
    manager = scheduler.kv_cache_manager
    look = make_request("look", [*prompt, 1])
    assert manager.coordinator.find_longest_cache_hit(look.block_hashes, 40 * BLOCK)[1] == 0
    driver.end("cold")
    driver.until("cold")
    assert manager.coordinator.find_longest_cache_hit(look.block_hashes, 40 * BLOCK)[1] >= 39 * BLOCK


@both
def test_a_resume_begins_where_the_cache_ends(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous)
    prompt = list(range(40 * BLOCK))
    scheduler.add_request(make_request("turn-1", prompt, max_tokens=1))
    driver.step()
    driver.end("turn-1")
    driver.until("turn-1")
    scheduler.add_request(make_request("turn-2", [*prompt, *range(3000, 3200)]))
    driver.step()
    driver.step()
    job = driver.jobs["turn-2"]
    assert (job.start, job.end, job.resume) == (40 * BLOCK, 40 * BLOCK + 199, True)


@both
def test_a_full_lane_holds_others_back(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous, options={"lane_jobs": 1})
    for name in ("a", "b", "c"):
        scheduler.add_request(make_request(name, 400))
    for _ in range(4):
        assert driver.step() == {"stream": 1}
    assert list(driver.jobs) == ["a"]
    assert [status(scheduler, name) for name in "bc"] == [RequestStatus.WAITING] * 2
    usage = scheduler.kv_cache_manager.usage
    driver.end("a")
    driver.until("a")
    for _ in range(3):
        driver.step()
    assert list(driver.jobs) == ["b"]
    assert scheduler.kv_cache_manager.usage > usage


@both
def test_two_identical_prompts_are_computed_once(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous)
    prompt = list(range(40 * BLOCK))
    for name in ("a", "b"):
        scheduler.add_request(make_request(name, prompt))
    for _ in range(4):
        assert driver.step() == {"stream": 1}
    assert list(driver.jobs) == ["a"]
    driver.end("a")
    rows = driver.until("b")
    assert not driver.jobs
    assert rows[-1]["b"] == BLOCK  # all but the last block were found
    assert counts(scheduler)["lane_tokens"] == 40 * BLOCK - 1


@both
def test_a_prompt_that_shares_what_is_being_filled_waits_for_it(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous)
    system = list(range(40 * BLOCK))
    scheduler.add_request(make_request("a", [*system, *range(2000, 2100)]))
    scheduler.add_request(make_request("b", [*system, *range(3000, 3200)]))
    scheduler.add_request(make_request("other", 300))
    for _ in range(4):
        driver.step()
    assert set(driver.jobs) == {"a", "other"}
    driver.end("a")
    driver.until("a")
    driver.step()
    driver.step()
    assert driver.jobs["b"].start == 40 * BLOCK


@both
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_cancelled(asynchronous: bool, steps: int) -> None:
    """Its blocks stay the lane's until the lane has let go of them."""
    scheduler, driver = started(asynchronous)
    scheduler.add_request(make_request("cold", 600))
    for _ in range(steps):
        driver.step()
    scheduler.finish_requests("cold", RequestStatus.FINISHED_ABORTED)
    if steps:
        assert scheduler.kv_cache_manager.usage > 38 / 10_000
    for _ in range(6):
        assert driver.step() == {"stream": 1}
    assert not driver.jobs
    assert not scheduler._lane.busy
    assert not scheduler._lane._filling
    assert not scheduler._lane.reasons
    assert set(scheduler.requests) == {"stream"}
    scheduler.finish_requests("stream", RequestStatus.FINISHED_ABORTED)
    for _ in range(3):
        driver.step()
    assert scheduler.kv_cache_manager.usage == 0.0


@both
def test_failed_and_computed_again_in_steps(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous)
    scheduler.add_request(make_request("cold", 600))
    driver.step()
    driver.step()
    driver.fail("cold")
    rows = driver.until("cold")
    while scheduler.requests["cold"].num_computed_tokens < 600:
        rows.append(driver.step())
    assert sum(row.get("cold", 0) for row in rows) == 600
    assert all(row.get("stream") == 1 for row in rows)
    done = counts(scheduler)
    assert (done["lane_failed_requests"], done["step_lane_down_requests"]) == (1, 1)
    # Nothing more goes there until a lane says that it is ready.
    scheduler.add_request(make_request("next", 300))
    driver.until("next")
    driver.report = LaneReport((Slot(1, 1),))
    driver.step()
    driver.step()
    scheduler.add_request(make_request("after", 300))
    driver.step()
    driver.step()
    assert list(driver.jobs) == ["after"]


@both
def test_a_preempted_sequence_is_filled_again_by_the_lane(asynchronous: bool) -> None:
    """All it had, prompt and answer, but the last token, is one job."""
    scheduler, driver = started(asynchronous, num_blocks=50, options={"lane_min_tokens": 64})
    scheduler.add_request(make_request("b", 25 * BLOCK))
    driver.step()
    driver.step()
    driver.end("b")
    driver.until("b")
    scheduler.add_request(make_request("c", 10 * BLOCK))
    driver.step()
    driver.step()
    driver.end("c")
    driver.until("c")
    while not any(request.num_preemptions for request in scheduler.requests.values()):
        driver.step()
    victim = next(request for request in scheduler.requests.values() if request.num_preemptions)
    # The blocks it lost are still cached: taken by somebody else, they are not.
    rivals = [request for request in scheduler.requests.values() if request is not victim]
    for rival in rivals:
        if rival.request_id != "stream":
            scheduler.finish_requests(rival.request_id, RequestStatus.FINISHED_ABORTED)
    for block in range(1, 50):
        scheduler.kv_cache_manager.block_pool._maybe_evict_cached_block(
            scheduler.kv_cache_manager.block_pool.blocks[block]
        )
    for _ in range(4):
        driver.step()
    job = driver.jobs[victim.request_id]
    assert job.token_ids == list(victim.all_token_ids)
    assert job.end == victim.num_tokens - 1 > victim.num_prompt_tokens
    driver.end(victim.request_id)
    assert driver.until(victim.request_id)[-1][victim.request_id] == 1


@both
def test_what_is_not_for_the_lane(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous)
    unfit = make_request("unfit", 300)
    unfit.sampling_params = SamplingParams(max_tokens=4, prompt_logprobs=1)
    for request in (make_request("short", 90), unfit):
        scheduler.add_request(request)
        driver.until(request.request_id)
    done = counts(scheduler)
    assert (done["step_short_requests"], done["step_unfit_requests"]) == (2, 1)  # the stream is short too
    assert not driver.jobs


def test_nobody_decodes() -> None:
    scheduler: Any = make_scheduler(options={"mode": "lanes", "lane_min_tokens": 100}, lanes=True)
    driver = LaneDriver(scheduler)
    scheduler.add_request(make_request("cold", 600))
    assert driver.step() == {"cold": 600}
    assert counts(scheduler)["step_idle_requests"] == 1


@pytest.mark.parametrize(
    ("target_rate", "in_lane", "reason"),
    [(500.0, True, "lane_tight_target_requests"), (5000.0, False, "step_loose_target_requests")],
)
def test_auto_decides_by_rates(target_rate: float, in_lane: bool, reason: str) -> None:
    scheduler, driver = started(options={"mode": "auto", "tpot_slo_ms": 20})
    scheduler._lane.rates = SimpleNamespace(
        target_ms=20.0,
        prefill_rate=lambda sequences, context, tokens, before: target_rate,
        device_rate=lambda tokens, before: 4000.0,
    )
    scheduler.add_request(make_request("cold", 600))
    driver.step()
    driver.step()
    assert ("cold" in driver.jobs) is in_lane
    assert counts(scheduler)[reason] == 1


def test_auto_knows_nothing_at_first() -> None:
    scheduler, driver = started(options={"mode": "auto", "tpot_slo_ms": 20})
    scheduler._controller.whole.model = type(scheduler._controller.whole.model)()
    scheduler.add_request(make_request("cold", 600))
    driver.until("cold")
    assert counts(scheduler)["step_unknown_requests"] == 1


@both
def test_tokens_of_the_lane_are_nobodys_cache_hits(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous)
    scheduler.add_request(make_request("cold", 600))
    driver.step()
    driver.step()
    request: Request = scheduler.requests["cold"]
    assert request.prefill_stats is not None
    assert (request.prefill_stats.num_prompt_tokens, request.prefill_stats.num_cached_tokens) == (600, 0)
    statistics = scheduler.make_stats()
    assert statistics.connector_prefix_cache_stats.hits == 0
    assert statistics.connector_prefix_cache_stats.queries == 0


@both
def test_the_cache_is_reset_while_the_lane_works(asynchronous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, driver = started(asynchronous)
    for name in ("a", "b"):
        scheduler.add_request(make_request(name, 400))
    driver.step()
    driver.step()
    scheduler.finish_requests("b", RequestStatus.FINISHED_ABORTED)

    def drain() -> set[str]:
        ended = set(driver.jobs)
        driver.jobs.clear()
        return ended

    monkeypatch.setattr(dispatch, "local_worker_half", lambda: SimpleNamespace(drain=drain))
    while driver.in_flight:
        driver.finish()
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    assert scheduler.kv_cache_manager.usage == 0.0
    assert not scheduler._lane.busy
    assert set(scheduler.requests) == {"stream", "a"}
    rows = driver.until("a") if "a" not in driver.step() else []
    assert len(rows) < 40


def test_a_lane_in_another_process_cannot_be_drained(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, driver = started()
    scheduler.add_request(make_request("a", 400))
    driver.step()
    monkeypatch.setattr(dispatch, "local_worker_half", lambda: None)
    with pytest.raises(RuntimeError, match=r"1 prompts are in the prefill lane .* call again"):
        scheduler.reset_prefix_cache(reset_running_requests=True)


def test_slots_follow_what_streams_see() -> None:
    scheduler, driver = started(options={"tpot_slo_ms": 50})
    driver.report = LaneReport((Slot(4, 12), Slot(8, 8), Slot(12, 4)), tokens=512, seconds=0.25)
    driver.step()
    scheduler._lane.decoded(1.0)
    assert scheduler._lane.tokens_per_s == pytest.approx(2048.0)
    for _ in range(20):
        scheduler._lane.decoded(10.0)
    driver.step()
    assert driver.slots[-1] == 0
    for _ in range(40):
        scheduler._lane.decoded(49.0)
    driver.step()
    assert driver.slots[-1] > 0
