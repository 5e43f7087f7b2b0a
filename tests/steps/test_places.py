"""How many requests may run: every limit that vLLM admits by, on its real scheduler without a model."""

from typing import Any

from vllm.v1.core.sched.interface import PauseState

from tests.support.schedulers import Driver, make_request, make_scheduler


def planned_places(monkeypatch: Any, scheduler: Any) -> list[int]:
    """What the policy is told of free places in each step that it plans."""
    places: list[int] = []
    plan = scheduler.engine_policy.plan

    def noted(decodes: int, context: int, most: int, free: int, *rest: Any) -> Any:
        places.append(free)
        return plan(decodes, context, most, free, *rest)

    monkeypatch.setattr(scheduler.engine_policy, "plan", noted)
    return places


def test_places_are_those_of_the_smaller_limit(monkeypatch: Any) -> None:
    scheduler: Any = make_scheduler(max_num_seqs=8, max_num_active_seqs=2)
    places, driver = planned_places(monkeypatch, scheduler), Driver(scheduler)
    for number in range(4):
        scheduler.add_request(make_request(f"r{number}", 40, max_tokens=100))
    assert set(driver.step()) == {"r0", "r1"}
    assert set(driver.step()) == {"r0", "r1"}
    assert places == [2, 0]


def test_a_streamed_session_between_two_parts_keeps_its_place(monkeypatch: Any) -> None:
    scheduler: Any = make_scheduler(max_num_seqs=2)
    places, driver = planned_places(monkeypatch, scheduler), Driver(scheduler)
    scheduler.add_request(make_request("streamed", 40, max_tokens=1, resumable=True))
    driver.step()
    assert scheduler.num_waiting_for_streaming_input == 1
    for number in range(2):
        scheduler.add_request(make_request(f"r{number}", 40, max_tokens=100))
    assert set(driver.step()) == {"r0"}
    driver.step()
    assert places[-2:] == [1, 0]


def test_a_paused_engine_has_no_place(monkeypatch: Any) -> None:
    scheduler: Any = make_scheduler()
    places, driver = planned_places(monkeypatch, scheduler), Driver(scheduler)
    scheduler.add_request(make_request("runs", 40, max_tokens=100))
    driver.step()
    scheduler.set_pause_state(PauseState.PAUSED_NEW)
    scheduler.add_request(make_request("waits", 40, max_tokens=100))
    assert set(driver.step()) == {"runs"}
    assert places[-1] == 0
