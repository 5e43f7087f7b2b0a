"""Features: events reach those that define them, in order, and what is absent answers."""

from collections.abc import Iterable
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.support.lane_driver import started
from tests.support.schedulers import Driver, make_request, make_scheduler
from vllm_agentserve.policy.call import Call
from vllm_agentserve.policy.engine import NoPrograms
from vllm_agentserve.policy.order import DECIDE_STEPS
from vllm_agentserve.policy.program_order import ProgramOrder
from vllm_agentserve.policy.waiting import VllmOrder, WaitingList
from vllm_agentserve.scheduler.features import Events, Feature
from vllm_agentserve.scheduler.features.lane import LaneFeature, NoLaneFeature
from vllm_agentserve.scheduler.scheduler import AgentScheduler


class Follows(Feature):
    """Notes every event, with the request it is about."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def arrived(self, call: Call) -> None:
        self.seen.append(f"arrived {call.name} {'waiting' if call.key is not None else 'not waiting'}")

    def before_step(self, decodes: int, context: int) -> None:
        self.seen.append(f"before_step {decodes} {context}")

    def before_plan(self) -> None:
        self.seen.append("before_plan")

    def after_schedule(self) -> None:
        self.seen.append("after_schedule")

    def admitted(self, call: Call) -> None:
        self.seen.append(f"admitted {call.name}")

    def finished(self, sequences: int, interval_ms: float | None, chunks: Iterable[Any], beside_lane: bool) -> None:
        self.seen.append(f"finished {sequences} {[chunk.tokens for chunk in chunks]} {beside_lane}")

    def freed(self, call: Call) -> None:
        self.seen.append(f"freed {call.name}")

    def before_reset(self) -> None:
        self.seen.append("before_reset")

    def report(self) -> dict[str, float]:
        return {"seen": float(len(self.seen))}

    def faults(self, calls: Iterable[Call]) -> list[str]:
        return [f"{call.name} is here" for call in calls]


def followed(**given: Any) -> tuple[Any, Driver, Follows]:
    scheduler: Any = make_scheduler(**given)
    follows = Follows()
    scheduler._events = Events([*scheduler._events.features, follows])
    scheduler._log._finished = scheduler._events.finished
    return scheduler, Driver(scheduler), follows


def test_the_life_of_a_request_in_events() -> None:
    scheduler, driver, follows = followed(options={"mode": "time-sliced"})
    scheduler.add_request(make_request("a", 40, max_tokens=3))
    for _ in range(3):
        driver.step()
    assert follows.seen == [
        "arrived a waiting",
        "before_step 0 0",
        "before_plan",
        "after_schedule",
        "admitted a",
        "finished 0 [40] False",
        # Steps of decodes only are vLLM's own.
        "finished 1 [] False",
        "finished 1 [] False",
        "freed a",
    ]
    assert scheduler.report()["seen"] == len(follows.seen)


def test_a_request_that_is_aborted_while_it_waits_is_freed_once() -> None:
    scheduler, driver, follows = followed(options={"mode": "time-sliced"}, max_num_seqs=1)
    for name in "ab":
        scheduler.add_request(make_request(name, 40))
    driver.step()
    scheduler.finish_requests("b", RequestStatus.FINISHED_ABORTED)
    driver.step()
    assert follows.seen.count("freed b") == 1
    assert list(scheduler.calls) == ["a"]


def test_a_reset_asks_the_features_only_where_running_requests_are_reset() -> None:
    scheduler, driver, follows = followed(options={"mode": "time-sliced"})
    scheduler.add_request(make_request("a", 40))
    driver.step()
    scheduler.reset_prefix_cache()
    assert "before_reset" not in follows.seen
    scheduler.reset_prefix_cache(reset_running_requests=True)
    assert "before_reset" in follows.seen


def test_events_call_only_those_that_define_them() -> None:
    class Frees(Feature):
        def freed(self, call: Call) -> None:
            pass

    frees = Frees()
    events = Events([NoLaneFeature(), frees])
    assert events.freed == (frees.freed,)
    assert events.arrived == events.before_step == events.finished == ()


def test_what_is_absent_answers() -> None:
    scheduler: Any = make_scheduler(policy="priority", options={"policy": "plas"})
    assert (type(scheduler.engine_policy.programs), type(scheduler.engine_policy.waiting)) == (NoPrograms, VllmOrder)
    assert type(scheduler._lane) is NoLaneFeature
    ours: Any = make_scheduler(options={"policy": "plas"})
    assert (type(ours.engine_policy.programs), type(ours.engine_policy.waiting)) == (ProgramOrder, WaitingList)
    lanes, _ = started()
    assert type(lanes._lane) is LaneFeature


def test_the_same_prompt_waits_for_vllms_order_as_long_as_it_must() -> None:
    """With vLLM's own order prompts are cut to the budget all the same, and nothing is left of ended requests."""
    scheduler: Any = make_scheduler(
        policy="priority", options={"mode": "time-sliced", "tpot_slo_ms": 10, "first_chunk_tokens": 64}
    )
    driver = Driver(scheduler)
    scheduler.add_request(make_request("stream", 20, max_tokens=200))
    driver.step()
    scheduler.add_request(make_request("cold", 3000, max_tokens=2))
    assert driver.step()["cold"] <= 128
    for _ in range(199):
        driver.step()
        assert scheduler.integrity.faults() == []
        if "cold" not in scheduler.requests:
            break
    assert set(scheduler.calls) == set(scheduler.requests)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_no_attribute_hides_one_of_vllms(asynchronous: bool) -> None:
    """vLLM's scheduler reads its own attributes in every step; `waiting` is the one we mean to replace."""
    stock: Any = make_scheduler(ours=False, asynchronous=asynchronous, policy="priority")
    ours: Any = make_scheduler(asynchronous=asynchronous, policy="priority", options={"policy": "plas"})
    changed = [
        name
        for name, value in vars(stock).items()
        if type(getattr(ours, name)) is not type(value) and name != "waiting"
    ]
    assert changed == []
    own = vars(type(ours)).keys() | vars(AgentScheduler).keys()
    assert {name for name in own if name in vars(stock)} == set()


def test_vllms_priorities_decide_who_is_preempted() -> None:
    """When KV blocks run out, the running request of the lowest priority gives up its blocks, not the latest one."""
    told = {}
    for ours in (True, False):
        scheduler: Any = make_scheduler(
            ours, policy="priority", num_blocks=11, options={"mode": "time-sliced"}, max_num_seqs=3
        )
        driver = Driver(scheduler)
        for name, priority in (("low", 9), ("high", 0), ("middle", 5)):
            scheduler.add_request(make_request(name, 40, max_tokens=60, priority=priority))
            driver.step()
        for _ in range(12):
            driver.step()
        told[ours] = [request.request_id for request in scheduler.running]
    assert told[True] == told[False]
    assert "low" not in told[True]


def test_levels_are_looked_at_every_sixteenth_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after quiet steps, in which nobody looks."""
    scheduler: Any = make_scheduler(options={"policy": "plas", "mode": "time-sliced"}, max_num_seqs=1)
    driver, looks = Driver(scheduler), []
    waiting = scheduler.engine_policy.waiting
    monkeypatch.setattr(waiting, "relevel", lambda limit: looks.append(scheduler.current_step))
    scheduler.add_request(make_request("a", 40, session="a"))
    for _ in range(20):
        driver.step()
    scheduler.add_request(make_request("b", 40, session="b"))
    looks.clear()
    for _ in range(40):
        driver.step()
    assert looks
    assert all(step % DECIDE_STEPS == 0 for step in looks)


def test_an_exception_in_vllms_schedule_leaves_no_prompt_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt that was asked for is not taken for one that is being computed."""
    options = {"mode": "time-sliced", "tpot_slo_ms": 10, "first_chunk_tokens": 64}
    scheduler: Any = make_scheduler(options=options)
    driver = Driver(scheduler)
    scheduler.add_request(make_request("stream", 20))
    driver.step()
    scheduler.add_request(make_request("a", 300))

    def fails(*given: Any, **named: Any) -> Any:
        raise RuntimeError("no blocks")

    with monkeypatch.context() as context:
        context.setattr(scheduler.kv_cache_manager, "allocate_slots", fails)
        with pytest.raises(RuntimeError, match="no blocks"):
            driver.step()
    assert [call.name for call in scheduler.engine_policy.prefilling] == []
    assert scheduler._count_decodes() == 1
    assert scheduler.waiting


def test_a_request_that_vllm_refuses_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler: Any = make_scheduler(options={"mode": "time-sliced", "policy": "plas"})

    def fails(*given: Any, **named: Any) -> Any:
        raise ValueError("refused")

    monkeypatch.setattr(scheduler, "_enqueue_waiting_request", fails)
    with pytest.raises(ValueError, match="refused"):
        scheduler.add_request(make_request("a", 40, session="s"))
    assert scheduler.calls == {}
    assert scheduler.engine_policy.programs.table.faults(()) == []


def test_the_lanes_connector_says_that_it_needs_our_scheduler() -> None:
    from vllm_agentserve.lanes.connector import Unserved

    with pytest.raises(RuntimeError, match=r"--scheduler-cls vllm_agentserve\.AgentScheduler"):
        Unserved().matched("request", 0)


def test_a_request_that_did_not_come_through_add_request_ends_all_the_same() -> None:
    """vLLM's own tests make such requests."""
    scheduler: Any = make_scheduler(options={"mode": "time-sliced", "policy": "plas"})
    request = make_request("a", 40)
    scheduler.requests["a"] = request
    request.status = RequestStatus.RUNNING
    scheduler.running.append(request)
    scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    assert (scheduler.requests, scheduler.calls) == ({}, {})
    assert scheduler.engine_policy.programs.table.faults(()) == []
