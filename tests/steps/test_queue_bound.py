"""The bound on waiting, for any sequence of arrivals: levels, classes, deadlines and lengths as a client likes."""

from math import inf
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.pinned import pinned
from tests.support.queues import LoneQueue
from tests.support.schedulers import make_request
from vllm_agentserve.policy.call import Call
from vllm_agentserve.policy.order import AdmissionKey, admission_key
from vllm_agentserve.policy.phase import Phase
from vllm_agentserve.policy.waiting import HELD, WaitingList

STEPS = 7
"""How many steps a request may be overtaken in these tests."""
REQUESTS = [make_request(f"r{number}", 8) for number in range(200)]

key = st.builds(
    admission_key,
    phase=st.sampled_from([Phase.COLD_PREFILL, Phase.RESUME_PREFILL]),
    uncached_tokens=st.integers(1, 500),
    arrival=st.just(0),
    resume_budget=st.just(256),
    level=st.integers(0, 7),
    batch=st.booleans(),
    due=st.one_of(st.just(inf), st.floats(0, 100)),
)


@settings(deadline=None)
@given(st.lists(st.lists(key, max_size=3), min_size=1, max_size=60))
def test_everybody_is_served_within_the_bound(arrivals: list[list[AdmissionKey]]) -> None:
    """One place a step: who waits is served STEPS steps after it came, and after those that came before it and still wait
    then, however many come later."""
    keys: dict[str, AdmissionKey] = {}
    queue = LoneQueue(lambda request, number: keys[request.request_id]._replace(arrival=number), STEPS)
    came: dict[str, int] = {}
    latest: dict[str, int] = {}
    unused = iter(REQUESTS)
    step = 0
    while step < len(arrivals) or len(queue):
        queue.step = step
        for drawn in arrivals[step] if step < len(arrivals) else []:
            request = next(unused)
            keys[request.request_id], came[request.request_id] = drawn, step
            queue.add_request(request)
        queue.promote_overdue()
        for name, since in came.items():
            if step - since == STEPS and name not in latest:
                before = list(came)[: list(came).index(name)]
                latest[name] = step + sum(other in {one.request_id for one in queue} for other in before)
        if queue:
            served = queue.pop_request().request_id
            assert step <= latest.get(served, step)
            queue.forget(served)
            del came[served]
        step += 1
        assert step < 1000


def test_a_held_call_waits_for_a_step_from_when_it_is_released() -> None:
    queue = LoneQueue(lambda request, number: AdmissionKey(2, arrival=number), STEPS)
    queue.add_request(REQUESTS[0])
    queue.park({"r0": HELD})
    promoted = []
    for step in range(1, 5 * STEPS):
        queue.step = step
        promoted.append(queue.promote_overdue())
        if step == 2 * STEPS - 1:
            queue.list.release(lambda call: True)
    assert [step for step, calls in enumerate(promoted, 1) if calls] == [3 * STEPS - 1]


def test_the_time_for_which_a_call_was_held_is_no_wait_for_steps() -> None:
    """Long steps make up for waiting; streams need not pay for a hold of minutes."""
    now = [100.0]
    waiting = WaitingList(lambda call: AdmissionKey(2, arrival=call.number), clock=lambda: now[0])
    call = Call(REQUESTS[0])
    waiting.add(call)
    waiting.park({call: HELD})
    now[0] = 400.0
    waiting.release(lambda call: True)
    now[0] = 401.0
    assert waiting.backlog().waited_ms == pytest.approx(1000.0)


def test_a_closed_queue_has_nobody_to_look_at_and_loses_nobody() -> None:
    queue = LoneQueue(lambda request, number: AdmissionKey(2, arrival=number), STEPS)
    for request in REQUESTS[:3]:
        queue.add_request(request)
    queue.list.closed = True
    assert (bool(queue), len(queue), list(queue)) == (False, 3, REQUESTS[:3])
    queue.list.closed = False
    assert [queue.pop_request() for _ in range(3)] == REQUESTS[:3]


def test_when_the_budget_is_spent_nobody_else_is_asked_for() -> None:
    """Four cold prompts behind one that takes the whole step: vLLM 0.33 would ask the budget for each of them."""
    scheduler, driver = pinned()
    scheduler.add_request(make_request("stream", 20))
    for _ in range(30):
        driver.step()
    for number in range(5):
        scheduler.add_request(make_request(f"cold-{number}", 500))
    closed: list[bool] = []
    grant = scheduler._grant

    def watched(*given: Any) -> int:
        granted = grant(*given)
        closed.append(scheduler.engine_policy.waiting.closed)
        return granted

    scheduler._grant = watched
    driver.step()
    assert closed[-1]
    assert not any(closed[:-1])
    assert not scheduler.engine_policy.waiting.closed
    assert len(scheduler.waiting) == 4
