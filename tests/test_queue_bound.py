"""The bound on waiting, for any sequence of arrivals: levels, classes, deadlines and lengths as a client likes."""

from math import inf

from hypothesis import given, settings
from hypothesis import strategies as st
from schedulers import make_request

from vllm_agentserve.policy.order import AdmissionKey, admission_key
from vllm_agentserve.policy.phase import Phase
from vllm_agentserve.scheduler.queues import AgentQueue

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
    queue = AgentQueue(lambda request, number: keys[request.request_id]._replace(arrival=number), STEPS)
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
