"""Prompts that wait for the prefill lane: nobody waits for ever, on vLLM's real scheduler."""

import pytest

from tests.support.lane_driver import both, counts, started, status
from tests.support.pinned import PinnedController
from tests.support.schedulers import BLOCK, make_request
from vllm_agentserve.policy.waiting import lane_takes

BASE = [(i * 13) % 3000 for i in range(30 * BLOCK)]
BOUND = 64
"""Default of `max_bypass_steps`."""


@both
def test_a_parked_prompt_is_overtaken_for_as_many_steps_as_any_other(asynchronous: bool) -> None:
    """Resume prefills that come again and again go before a cold prompt, in the park too, but not for ever."""
    scheduler, driver = started(asynchronous, options={"lane_max_requests": 1})
    scheduler.add_request(make_request("base", BASE, max_tokens=1))
    driver.step()
    driver.end("base")
    driver.until("base")
    driver.step()
    served = 0

    def resume() -> None:
        tail = [3000 + (served * 37 + i) % 900 for i in range(150)]
        scheduler.add_request(make_request(f"R{len(scheduler.requests)}-{served}", BASE + tail, max_tokens=1))

    resume()
    served += 1
    resume()
    driver.step()
    scheduler.add_request(make_request("C", 600))
    for _ in range(BOUND + 10):
        driver.step()
        if "C" in driver.jobs:
            break
        for name in list(driver.jobs):
            driver.end(name)
            served += 1
            resume()
    assert "C" in driver.jobs
    assert served > 10


@both
def test_a_prompt_that_finds_no_room_in_the_lane_goes_through_steps(asynchronous: bool) -> None:
    """Both places are held by prompts that take minutes."""
    scheduler, driver = started(asynchronous)
    for name in ("long-1", "long-2"):
        scheduler.add_request(make_request(name, 3000))
    driver.step()
    driver.step()
    scheduler.add_request(make_request("C", 300))
    for _ in range(2 * BOUND - 5):
        assert driver.step() == {"stream": 1}
    rows = driver.until("C")
    while scheduler.requests["C"].num_computed_tokens < 300:
        rows.append(driver.step())
    assert sum(row.get("C", 0) for row in rows) == 300
    assert counts(scheduler)["step_lane_full_requests"] == 1
    assert scheduler.integrity.faults() == []


@both
def test_a_prompt_whose_beginning_is_being_computed_does_not_compute_it_again(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous)
    scheduler.add_request(make_request("first", BASE))
    driver.step()
    scheduler.add_request(make_request("second", [*BASE[:-BLOCK], *range(3000, 3020)]))
    for _ in range(5 * BOUND):
        assert driver.step() == {"stream": 1}
    driver.end("first")
    rows = driver.until("second")
    assert sum(row.get("second", 0) for row in rows) < 3 * BLOCK


@pytest.mark.parametrize("room", [None, 1])
def test_overdue_prompts_are_first_when_there_is_room(room: int | None) -> None:
    scheduler, driver = started(options={"lane_max_requests": 1})
    scheduler.add_request(make_request("long", 3000))
    driver.step()
    scheduler.add_request(make_request("old", 600))
    for _ in range(BOUND + 2):
        driver.step()
    queue = scheduler.engine_policy.waiting
    scheduler.add_request(make_request("new", 600))
    driver.step()
    assert queue.parked == 2
    assert [one[2].name for one in queue._parked] == ["old", "new"]
    queue.release(lane_takes(room, ()))
    assert queue[0].name == "old"
    assert queue.faults(scheduler.calls.values()) == []
    assert status(scheduler, "old").name == "WAITING"


@both
def test_a_prompt_that_was_overdue_before_it_was_parked_goes_through_steps_too(asynchronous: bool) -> None:
    """Every place is taken until it is overdue in line; then it is parked for a lane whose one job takes minutes."""
    scheduler, driver = started(asynchronous, options={"lane_max_requests": 1}, max_num_seqs=4)
    scheduler.add_request(make_request("long", 3000))
    for _ in range(2):
        driver.step()
    for number in range(3):
        scheduler.add_request(make_request(f"short-{number}", 20, max_tokens=BOUND + 20))
    driver.step()
    scheduler.add_request(make_request("C", 300))
    for _ in range(BOUND + 25):
        driver.step()
    assert scheduler.engine_policy.waiting.parked
    rows = [driver.step() for _ in range(2 * BOUND)]
    assert sum(row.get("C", 0) for row in rows) >= 300
    assert scheduler.integrity.faults() == []


@both
def test_room_in_the_lane_does_not_let_a_cold_prompt_for_steps_block_the_line(asynchronous: bool) -> None:
    """Two cold prompts too short for the lane, one of them being read; the lane has room all the time. Tool results go on."""
    options = {"lane_min_tokens": 15_000, "tpot_slo_ms": 10, "first_chunk_tokens": 4096, "chunk_granularity_tokens": 16}
    scheduler, driver = started(asynchronous, options=options, num_blocks=20_000, controller=PinnedController)
    scheduler.add_request(make_request("base", BASE, max_tokens=1))
    driver.until("base")
    driver.step()
    scheduler.add_request(make_request("read", 12_000))
    driver.step()
    scheduler.add_request(make_request("next", 4000))
    for _ in range(BOUND + 6):
        driver.step()
    assert scheduler._lane.dispatch.room
    first: dict[str, int] = {}
    for step in range(20):
        scheduler.add_request(
            make_request(f"R{step}", BASE + [3000 + (step * 31 + i) % 900 for i in range(20)], max_tokens=1)
        )
        for name in driver.step():
            first.setdefault(name, step)
    assert all(first[f"R{step}"] <= step + 2 for step in range(16))
