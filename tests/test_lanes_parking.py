"""Prompts that wait for the prefill lane: nobody waits for ever, on vLLM's real scheduler."""

import pytest
from lane_driver import both, counts, started, status
from schedulers import BLOCK, make_request

BASE = [(i * 13) % 3000 for i in range(30 * BLOCK)]
BOUND = 64
"""Default of `max_bypass_steps`."""


@both
def test_a_parked_prompt_is_overtaken_for_as_many_steps_as_any_other(asynchronous: bool) -> None:
    """Resume prefills that come again and again go before a cold prompt, in the park too, but not for ever."""
    scheduler, driver = started(asynchronous, options={"lane_jobs": 1})
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
    scheduler, driver = started(options={"lane_jobs": 1})
    scheduler.add_request(make_request("long", 3000))
    driver.step()
    scheduler.add_request(make_request("old", 600))
    for _ in range(BOUND + 2):
        driver.step()
    queue = scheduler._queue
    scheduler.add_request(make_request("new", 600))
    driver.step()
    assert queue.parked == 2
    assert [one[2] for one in queue._parked] == ["old", "new"]
    queue.release(room, ())
    assert queue[0].request_id == "old"
    assert queue.faults(scheduler.requests) == []
    assert status(scheduler, "old").name == "WAITING"
