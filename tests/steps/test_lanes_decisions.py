"""Who goes to the lane and why, on vLLM's real scheduler; what is reported; resets of the cache; slots."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request, RequestStatus

from tests.support.lane_driver import PARKED, LaneDriver, LaneReport, Slot, both, counts, started, status
from tests.support.schedulers import BLOCK, make_request, make_scheduler
from vllm_agentserve.lanes import connector_scheduler
from vllm_agentserve.policy.jobs import Drained


@both
def test_what_is_not_for_the_lane(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous)
    unfit = make_request("unfit", 300)
    unfit.sampling_params = SamplingParams(max_tokens=4, prompt_logprobs=1)
    for request in (make_request("short", 90), unfit):
        scheduler.add_request(request)
        driver.until(request.request_id)
    done = counts(scheduler)
    assert (done["step_short_requests"], done["step_ineligible_requests"]) == (2, 1)  # the stream is short too
    assert not driver.jobs


def test_nobody_decodes() -> None:
    scheduler: Any = make_scheduler(options={"mode": "lanes", "lane_min_tokens": 100}, lanes=True)
    driver = LaneDriver(scheduler)
    scheduler.add_request(make_request("cold", 600))
    assert driver.step() == {"cold": 600}
    assert counts(scheduler)["step_no_decodes_requests"] == 1


@pytest.mark.parametrize(
    ("target_rate", "in_lane", "reason"),
    [(500.0, True, "lane_faster_requests"), (5000.0, False, "step_faster_requests")],
)
def test_auto_decides_by_rates(target_rate: float, in_lane: bool, reason: str) -> None:
    scheduler, driver = started(options={"mode": "auto", "tpot_slo_ms": 20})
    scheduler._lane.dispatch.rates = SimpleNamespace(
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
    scheduler.engine_policy.controller.whole.model = type(scheduler.engine_policy.controller.whole.model)()
    scheduler.add_request(make_request("cold", 600))
    driver.until("cold")
    assert counts(scheduler)["step_unmeasured_requests"] == 1


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

    def drain() -> Drained:
        ended = frozenset(driver.jobs)
        driver.jobs.clear()
        return Drained(ended)

    monkeypatch.setattr(connector_scheduler, "local_worker_half", lambda: SimpleNamespace(drain=drain))
    while driver.in_flight:
        driver.finish()
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    assert scheduler.kv_cache_manager.usage == 0.0
    assert not scheduler._lane.busy
    assert set(scheduler.requests) == {"stream", "a"}
    rows = driver.until("a") if "a" not in driver.step() else []
    assert len(rows) < 40


@both
def test_the_cache_is_reset_while_a_prompt_the_lane_has_computed_waits_for_a_place(asynchronous: bool) -> None:
    """Nothing is under way, but who waits holds the blocks."""
    scheduler, driver = started(asynchronous, max_num_seqs=2)
    scheduler.add_request(make_request("cold", 400))
    driver.step()
    driver.step()
    scheduler.add_request(make_request("other", 50))
    driver.until("other")
    driver.end("cold")
    for _ in range(4):
        driver.step()
    assert (status(scheduler, "cold"), scheduler._lane.busy) == (PARKED, False)
    while driver.in_flight:
        driver.finish()
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    assert scheduler.kv_cache_manager.usage == 0.0
    scheduler.finish_requests("other", RequestStatus.FINISHED_ABORTED)
    driver.until("cold")
    assert scheduler.integrity.faults() == []


@both
def test_the_cache_is_reset_while_a_prompt_the_lane_has_computed_finds_no_room(asynchronous: bool) -> None:
    """The prompt fills its blocks, and its last token needs one more."""
    scheduler, driver = started(asynchronous, num_blocks=30)
    scheduler.add_request(make_request("cold", 24 * BLOCK + 1))
    driver.step()
    driver.step()
    scheduler.add_request(make_request("other", 40))
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks
    while free():
        driver.step()
    driver.end("cold")
    while status(scheduler, "cold") == PARKED:
        driver.step()
    assert (status(scheduler, "cold"), scheduler.requests["cold"].num_computed_tokens) == (RequestStatus.WAITING, 384)
    while driver.in_flight:
        driver.finish()
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    assert scheduler.kv_cache_manager.usage == 0.0
    driver.until("cold")
    assert scheduler.integrity.faults() == []


def test_a_lane_in_another_process_cannot_be_drained(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, driver = started()
    scheduler.add_request(make_request("a", 400))
    driver.step()
    monkeypatch.setattr(connector_scheduler, "local_worker_half", lambda: None)
    with pytest.raises(RuntimeError, match=r"1 prompts are in the prefill lane .* call again"):
        scheduler.reset_prefix_cache(reset_running_requests=True)


def test_slots_follow_what_streams_see() -> None:
    scheduler, driver = started(options={"tpot_slo_ms": 50})
    driver.report = LaneReport((Slot(4, 12), Slot(8, 8), Slot(12, 4)), tokens=512, seconds=0.25)
    driver.step()
    scheduler._lane.dispatch.decoded(1.0)
    assert scheduler._lane.dispatch.tokens_per_s == pytest.approx(2048.0)
    for _ in range(20):
        scheduler._lane.dispatch.decoded(10.0)
    driver.step()
    assert driver.slots[-1] == 0
    for _ in range(40):
        scheduler._lane.dispatch.decoded(49.0)
    driver.step()
    assert driver.slots[-1] > 0


def test_what_was_measured_outlives_a_lane() -> None:
    scheduler, driver = started()
    driver.report = LaneReport((), tokens=512, seconds=0.25)
    driver.step()
    scheduler._lane.dispatch.policy.failed()
    driver.report = LaneReport((Slot(1, 1),))
    driver.step()
    assert scheduler._lane.dispatch.policy.ready
    assert scheduler._lane.dispatch.tokens_per_s == pytest.approx(2048.0)
