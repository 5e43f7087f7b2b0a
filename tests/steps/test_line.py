"""What a step has to know of those who wait: who counts, for how long, and for whom time is kept."""

from typing import Any

import pytest

from tests.support.calls import call_of
from tests.support.pinned import pinned, with_cached_contexts
from tests.support.queues import LoneQueue
from tests.support.schedulers import make_request
from vllm_agentserve.policy.call import Backlog
from vllm_agentserve.policy.latency import StepModel
from vllm_agentserve.policy.order import AdmissionKey, Urgency
from vllm_agentserve.policy.phase import Phase
from vllm_agentserve.policy.waiting import Line


def key(number: int, cold: bool, tokens: int = 100, batch: bool = False) -> AdmissionKey:
    uncached = 0 if cold else tokens
    return AdmissionKey(Urgency.NORMAL, batch, cold=cold, uncached=uncached, arrival=number, tokens=tokens)


def line(*colds: bool) -> Line:
    """Requests in this order, whatever their kind."""
    made = Line()
    for number, cold in enumerate(colds):
        made.add((key(number, cold)._replace(level=number), number, call_of(f"r{number}")))
    return made


@pytest.mark.parametrize(
    ("colds", "places", "colds_wait", "tokens"),
    [
        ((), 3, False, 0),
        ((False, False, False), 2, False, 200),
        # the cold one takes a place, and the one behind it none: it has to wait until the first has been read
        ((True, False, False), 2, False, 100),
        ((True, True, False, False), 2, False, 100),
        ((True, False), 1, False, 0),
        # behind the places it takes none
        ((False, False, True), 2, False, 200),
        # another is being read: no cold one takes a place
        ((True, False, False), 2, True, 200),
        ((True, True), 2, True, 0),
    ],
)
def test_for_whom_time_is_kept(colds: tuple[bool, ...], places: int, colds_wait: bool, tokens: int) -> None:
    assert line(*colds).waiting_resume_tokens(places, colds_wait) == tokens


def test_batch_prompts_wait_for_nothing() -> None:
    made = Line()
    entries = [
        (key(number, True, 10 * (number + 1), batch=number % 2 == 0), number, call_of(f"r{number}"))
        for number in range(4)
    ]
    for entry, came in zip(entries, (1.0, 2.0, 5.0, 6.0), strict=True):
        entry[2].wait_since_s = came
        made.add(entry)
    assert made.tokens == 100
    assert made.backlog(10.0) == Backlog(2, 60, pytest.approx(6000.0))
    made.remove(entries[1])
    assert made.backlog(10.0) == Backlog(1, 40, pytest.approx(4000.0))
    made.remove(entries[3])
    assert made.backlog(10.0) == Backlog()
    assert made.tokens == 40
    assert made.faults() == []


def test_waiting_is_counted_from_when_this_wait_began() -> None:
    """A request that ran and lost its place waits anew; one that was skipped within a step does not."""
    now = [0.0]
    queue = LoneQueue(lambda request, number: key(number, True), 64, clock=lambda: now[0])
    request = make_request("a", 100)
    queue.add_request(request)
    now[0] = 3.0
    assert queue.backlog() == Backlog(1, 100, pytest.approx(3000.0))
    queue.pop_request()
    queue.prepend_request(request)
    assert queue.backlog().waited_ms == pytest.approx(3000.0)
    queue.pop_request()
    queue.step += 20
    now[0] = 10.0
    queue.prepend_request(request)
    now[0] = 11.0
    assert queue.backlog().waited_ms == pytest.approx(1000.0)


def test_no_step_is_predicted_to_be_shorter_than_the_shortest() -> None:
    model = StepModel()
    for sequences in (8, 4, 8, 4):
        model.learn_decode(sequences, 0, 2.0 * sequences)
    shortest = 8.0
    assert model._decode_raw(1, 0) < shortest
    assert model.decode_ms(1, 0) == shortest


def evict(scheduler: Any, tokens: list[int]) -> None:
    """Drops what the prefix cache holds of these tokens."""
    pool = scheduler.kv_cache_manager.block_pool
    for block_hash in make_request("probe", [*tokens, 1]).block_hashes:
        for block in pool.get_cached_block(block_hash, [0]) or []:
            pool._maybe_evict_cached_block(block)


def test_a_resume_prefill_whose_context_is_gone_does_not_block_those_behind_it() -> None:
    scheduler, driver = pinned(options={"mode": "time-sliced"}, max_num_seqs=4)
    lost, kept = with_cached_contexts(scheduler, driver, 1600, 1600)
    scheduler.add_request(make_request("stream", 20, max_tokens=10_000))
    scheduler.add_request(make_request("cold", 6000, max_tokens=2))
    driver.step()
    scheduler.add_request(make_request("gone", lost + list(range(60)), max_tokens=2))
    evict(scheduler, lost)
    for number in range(2):
        scheduler.add_request(
            make_request(f"resume-{number}", kept + [number * 97 + t for t in range(70)], max_tokens=2)
        )
    first: dict[str, int] = {}
    for step in range(6):
        for name in driver.step():
            first.setdefault(name, step)
    assert first["resume-0"] <= 2
    assert first["resume-1"] <= 4


def test_a_resume_prefill_that_runs_keeps_its_time_beside_a_cold_one() -> None:
    """250 tokens at 100 a step beside a cold prompt that was there first: three steps, not the floor of 16 a step."""
    scheduler, driver = pinned(options={"mode": "time-sliced"})
    context = with_cached_contexts(scheduler, driver, 1600)[0]
    scheduler.add_request(make_request("stream", 20, max_tokens=10_000))
    scheduler.add_request(make_request("cold", 6000, max_tokens=2))
    driver.step()
    scheduler.add_request(make_request("resume", context + list(range(250)), max_tokens=2))
    rows = [driver.step().get("resume", 0) for _ in range(5)]
    assert sum(tokens > 1 for tokens in rows) <= 4
    assert sum(tokens for tokens in rows if tokens > 1) >= 250


def test_a_region_shrinks_where_chunks_far_inside_take_far_too_long() -> None:
    from vllm_agentserve.policy.budget import TrustRegion

    region = TrustRegion(32)
    region._tokens, region._attended = 8000.0, 1e9
    for _ in range(3):
        region.tried_beside_decodes([(Phase.COLD_PREFILL, 400, 0)], ratio=10.0)
    assert region._tokens == pytest.approx(1000.0)


def test_nobody_has_waited_for_less_than_no_time() -> None:
    """The engine has run for months, and the queue was never empty: what is left of the sum of times is not exact."""
    made = Line()
    waits: Any = None
    for number in range(2000):
        came = 1e7 + 0.1 * number
        call = call_of(f"r{number}")
        call.wait_since_s = came
        entry = (key(number, True), number, call)
        made.add(entry)
        if waits is not None:
            made.remove(waits)
        waits = entry
        assert made.backlog(came).waited_ms >= 0.0
