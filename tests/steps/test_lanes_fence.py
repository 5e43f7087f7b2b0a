"""Nobody reads a KV block before it is written: steps, lane jobs, and what follows them, on vLLM's real scheduler."""

import random

import pytest
from vllm.v1.request import RequestStatus

from tests.support.lane_driver import both
from tests.support.lane_worker import FollowedLane, at_work, no_waiting
from tests.support.schedulers import BLOCK, make_request
from vllm_agentserve.policy.fence import StepFence

SHARED = [(i * 13) % 3000 for i in range(30 * BLOCK)]


def test_work_waits_for_the_step_it_was_sent_with() -> None:
    fence: StepFence[str] = StepFence()
    assert fence.step_has_run() == []
    fence.begin_step(["a", "b"])
    fence.begin_step()
    fence.begin_step(["c"])
    assert len(fence) == 3
    assert fence.step_has_run() == ["a", "b"], "the others were sent with later steps"
    assert fence.step_has_run() == []
    assert fence.step_has_run() == ["c"]
    assert fence.step_has_run() == []
    assert len(fence) == 0


def test_work_that_is_dropped_never_begins_and_steps_stay_in_order() -> None:
    fence: StepFence[str] = StepFence()
    fence.begin_step(["a"])
    fence.begin_step(["b", "c"])
    assert fence.drop() == ["a", "b", "c"]
    fence.begin_step(["d"])
    assert [fence.step_has_run() for _ in range(3)] == [[], [], ["d"]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    no_waiting(monkeypatch)


@both
def test_a_job_reads_no_block_that_its_own_step_is_to_write(asynchronous: bool) -> None:
    """A short prompt is computed in the step; a long one with the same beginning goes to the lane in the same `schedule()`."""
    scheduler, driver = at_work(asynchronous)
    scheduler.add_request(make_request("short", [*SHARED[: 5 * BLOCK], 7]))
    scheduler.add_request(make_request("long", SHARED[: 5 * BLOCK] + list(range(2000, 2300)), max_tokens=4))
    driver.until("long")
    while "long" in scheduler.requests:
        driver.step()
    assert scheduler.counts["lane_requests"] == 1
    assert driver.kv.wrong == []


@both
def test_a_job_reads_no_block_of_a_prompt_that_is_being_read_in_steps(asynchronous: bool) -> None:
    scheduler, driver = at_work(asynchronous)
    scheduler._lane.dispatch.policy.ready = False
    scheduler.add_request(make_request("first", SHARED))
    while scheduler.requests["first"].num_computed_tokens < 10 * BLOCK:
        driver.step()
    scheduler._lane.dispatch.policy.ready = True
    scheduler.add_request(make_request("second", SHARED[:-BLOCK] + list(range(2000, 2300)), max_tokens=4))
    driver.until("second")
    assert scheduler.counts["lane_requests"] == 1
    assert driver.kv.wrong == []


@both
@pytest.mark.parametrize("chunk", [16, 100, 10**6])
@pytest.mark.parametrize("seed", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_random_prompts_that_share_beginnings(asynchronous: bool, chunk: int, seed: int) -> None:
    """Also with a cache that is too small, aborts at any time, and a lane that dies."""
    rng = random.Random(seed * 1000 + chunk)
    scheduler, driver = at_work(
        asynchronous,
        lambda kv: FollowedLane(kv, chunk),
        num_blocks=120,
        max_num_batched_tokens=256,
        options={"lane_min_tokens": 48, "tpot_slo_ms": 60_000, "first_chunk_tokens": 256},
    )
    names: list[str] = []
    for _ in range(50):
        salt = rng.randrange(3)
        for _ in range(rng.choice((0, 0, 1, 3))):  # they come together, as the calls of an agent do
            tail = [3000 + rng.randrange(900) for _ in range(rng.randint(1, 150))]
            shared = SHARED[: rng.choice((0, 3, 9, 20)) * BLOCK + rng.randrange(BLOCK)]
            prompt = [salt, *shared, *tail]
            names.append(f"r{len(names)}")
            scheduler.add_request(make_request(names[-1], prompt, max_tokens=rng.randint(1, 40)))
        for _ in range(rng.randint(1, 4)):
            driver.step()
            assert scheduler.integrity.faults() == []
        if names and rng.random() < 0.15:
            scheduler.finish_requests(rng.choice(names), RequestStatus.FINISHED_ABORTED)
        if rng.random() < 0.05 and driver.worker.restarts < 3:
            driver.lanes[-1].up = False
    for _ in range(2000):
        if scheduler.requests.keys() <= {"s"}:
            break
        driver.step()
    assert driver.kv.wrong == []
    assert scheduler.requests.keys() <= {"s"}
    assert scheduler.counts["lane_requests"] > 10
    assert scheduler.integrity.faults() == []
