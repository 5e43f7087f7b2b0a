"""In which order waiting requests are admitted, on vLLM's real scheduler without a model; and the queue itself."""

import pytest
from vllm.v1.core.sched.request_queue import FCFSRequestQueue, PriorityRequestQueue

from tests.support.pinned import context_of, phases, pinned, waiting, with_cached_contexts
from tests.support.queues import LoneQueue
from tests.support.schedulers import BLOCK, Driver, make_request, make_scheduler
from vllm_agentserve.policy.order import AdmissionKey, Urgency


def test_resume_prefills_come_before_cold_ones_and_the_shortest_first() -> None:
    scheduler, driver = pinned()
    first, second, third = with_cached_contexts(scheduler, driver, 320, 320, 320)
    scheduler.add_request(make_request("decoding", 10))
    driver.step()
    scheduler.add_request(make_request("cold", 500))
    scheduler.add_request(make_request("long resume", first + list(range(300))))
    scheduler.add_request(make_request("resume 60", second + list(range(60))))
    scheduler.add_request(make_request("resume 20", third + list(range(20))))
    assert waiting(scheduler) == ["resume 20", "resume 60", "cold", "long resume"]
    assert driver.step() == {"decoding": 1, "resume 20": 20, "resume 60": 60, "cold": 16}
    assert driver.step() == {"decoding": 1, "resume 20": 1, "resume 60": 1, "cold": 93}


def test_a_running_cold_prefill_makes_room_for_a_waiting_resume() -> None:
    scheduler, driver = pinned()
    (context,) = with_cached_contexts(scheduler, driver, 320)
    scheduler.add_request(make_request("decoding", 10))
    driver.step()
    scheduler.add_request(make_request("cold", 500))
    assert driver.step() == {"decoding": 1, "cold": 95}
    scheduler.add_request(make_request("resume", context + list(range(40))))
    row = driver.step()
    assert row["resume"] == 40
    assert 16 <= row["cold"] <= 60


def test_nobody_is_overtaken_for_longer_than_the_bound() -> None:
    """Short resume prefills keep coming; a cold prompt still starts within max_bypass_steps, and then never stands still."""
    scheduler, driver = pinned(options={"max_bypass_steps": 10, "resume_budget_max_tokens": 64}, max_num_seqs=256)
    contexts = with_cached_contexts(scheduler, driver, *[320] * 8)
    scheduler.add_request(make_request("decoding", 10))
    driver.step()
    scheduler.add_request(make_request("cold", 400))
    started = None
    chunks = []
    for step in range(60):
        for n in range(4):
            scheduler.add_request(make_request(f"resume-{step}-{n}", contexts[n] + [step] * 40, max_tokens=1))
        chunks.append(driver.step().get("cold", 0))
        if chunks[-1] and started is None:
            started = step
    assert started is not None
    assert started <= 11
    through = chunks[started : started + 25]
    assert sum(through) >= 400
    assert all(chunk >= 16 for chunk in through[: through.index(1)][:-1])


def test_cold_prompts_keep_their_order_of_arrival() -> None:
    scheduler, driver = pinned(max_num_seqs=2)
    for name in ("a", "b", "c", "d"):
        scheduler.add_request(make_request(name, 100, max_tokens=3))
    began: list[str] = []
    while scheduler.requests:
        began += [name for name in driver.step() if name not in began]
    assert began == ["a", "b", "c", "d"]


def test_a_shared_prompt_is_cold_once() -> None:
    """The second of two agents with the same system prompt is tagged again when the first has filled the cache."""
    scheduler, driver = pinned()
    system = context_of(make_request("system", 40 * BLOCK))
    scheduler.add_request(make_request("decoding", 10))
    driver.step()
    scheduler.add_request(make_request("first", system + [1] * 20))
    scheduler.add_request(make_request("second", system + [2] * 20))
    while "second" not in phases(scheduler):
        driver.step()
    assert scheduler.counts["cold_prefill_requests"] == 2  # decoding and first
    assert scheduler.counts["resume_prefill_requests"] == 1


def test_priority_policy_stays_in_force() -> None:
    scheduler, driver = pinned(policy="priority")
    assert isinstance(scheduler.waiting, PriorityRequestQueue)
    scheduler.add_request(make_request("decoding", 10))
    driver.step()
    scheduler.add_request(make_request("later", 300, priority=1))
    scheduler.add_request(make_request("first", 300, priority=0))
    row = driver.step()
    assert (row["decoding"], row["first"], "later" in row) == (1, 95, False)


def test_stock_mode_is_stock() -> None:
    ours, stock = (make_scheduler(cls, options={"mode": "stock"}) for cls in (True, False))
    assert isinstance(ours.waiting, FCFSRequestQueue)
    drivers = [Driver(ours), Driver(stock)]
    for step in range(12):
        for driver in drivers:
            if step % 3 == 0:
                driver.scheduler.add_request(make_request(f"r{step}", [step] * 3000, max_tokens=5))
        assert drivers[0].step() == drivers[1].step()


def test_queue_answers_like_a_queue() -> None:
    queue = LoneQueue(lambda request, number: AdmissionKey(Urgency.NORMAL, cold=True, arrival=number), patience=5)
    first, second = make_request("first", 10), make_request("second", 10)
    with pytest.raises(IndexError):
        queue.peek_request()
    for request in (first, second):
        queue.add_request(request)
    assert [request.request_id for request in queue] == ["first", "second"]
    assert (queue.pop_request(), len(queue), first in queue, second in queue) == (first, 1, False, True)
    queue.prepend_requests([first])
    assert queue[0] is first
    queue.remove_requests([first, make_request("stranger", 3)])
    with pytest.raises(ValueError, match="'first' is not in the queue"):
        queue.remove_request(first)
    queue.forget("second")
    assert not queue


def test_parked_requests_wait_unseen() -> None:
    queue = LoneQueue(lambda request, number: AdmissionKey(Urgency.NORMAL, cold=True, arrival=number), patience=5)
    requests = {name: make_request(name, 10) for name in "abcdef"}
    for request in requests.values():
        queue.add_request(request)
    queue.park({"a": None, "c": None, "d": "block 1", "e": "block 2", "stranger": None})
    assert (len(queue), queue.parked, bool(queue), queue.peek_request().request_id) == (6, 4, True, "b")
    assert [request.request_id for request in queue] == ["b", "f", "a", "c", "d", "e"]
    queue.release(0, {"block 1", "block 2"})
    assert queue.parked == 4
    queue.release(1, {"block 2"})
    assert [queue[index].request_id for index in range(4)] == ["a", "b", "d", "f"]
    queue.remove_requests([requests["c"], requests["b"]])
    assert (len(queue), requests["c"] in queue) == (4, False)
    for name in "adf":
        queue.remove_request(requests[name])
    assert (bool(queue), len(queue)) == (False, 1)
    queue.release(None, {"block 2"})
    assert not queue
    queue.release(None, set())
    assert queue.pop_request() is requests["e"]
    queue.park({"e": None})
    assert (len(queue), queue.parked) == (0, 0)


def test_a_parked_request_that_is_overdue_is_first_when_it_is_back() -> None:
    queue = LoneQueue(lambda request, number: AdmissionKey(Urgency.NORMAL, cold=True, arrival=number), patience=5)
    for name in ("early", "late"):
        queue.add_request(make_request(name, 10))
    queue.park({"late": None})
    queue.step = 5
    assert queue.promote_overdue() == 1
    queue.release(None, set())
    assert [request.request_id for request in queue] == ["early", "late"]
    assert all(key.urgency == Urgency.OVERDUE for key, _, _ in queue.list._line.entries)
