"""All state agrees after every step, whatever happens: random histories on vLLM's real scheduler without a model.

Here scheduling is asynchronous too, which no CPU engine is, and the lane ends, fails and is cancelled at any step.
"""

import random
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.support.lane_driver import LaneDriver
from tests.support.schedulers import Driver, make_request, make_scheduler

SHARED = [7] * 200
POLICIES: list[dict[str, Any]] = [
    {"policy": "fcfs"},
    {"policy": "plas", "program_quantum_ms": 1, "program_preempt_share": 0.5},
    {"policy": "atlas", "program_ttl_s": 1},
]


def arrive(rng: random.Random, scheduler: Any, number: int) -> None:
    """A request with a shared prefix or none, a session or none, hints that may be wrong."""
    tail = [rng.randrange(9, 4000) for _ in range(rng.randint(1, 260))]
    hints = {"agent_class": rng.choice(("batch", "boss")), "agent_thread": "t"} if rng.random() < 0.3 else None
    session = f"s{rng.randint(0, 5)}" if rng.random() < 0.5 else None
    prompt = SHARED[: rng.choice((0, 60, 200))] + tail
    scheduler.add_request(make_request(f"r{number}", prompt, rng.randint(1, 40), session=session, hints=hints))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
@pytest.mark.parametrize("options", POLICIES, ids=lambda options: options["policy"])
@pytest.mark.parametrize("lanes", [False, True], ids=["steps", "lanes"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_all_state_agrees_after_every_step(asynchronous: bool, lanes: bool, options: dict[str, Any], seed: int) -> None:
    rng = random.Random(f"{seed} {asynchronous} {lanes} {options}")
    mode = {"mode": "lanes", "lane_min_tokens": 48} if lanes else {"mode": "time-sliced"}
    scheduler = make_scheduler(
        asynchronous=asynchronous,
        lanes=lanes,
        options={"tpot_slo_ms": 10, "first_chunk_tokens": 64, **mode, **options},
        num_blocks=64,
        max_num_seqs=6,
    )
    driver = (LaneDriver if lanes else Driver)(scheduler, 2 if asynchronous else 1)
    jobs: dict[str, Any] = driver.jobs if isinstance(driver, LaneDriver) else {}
    number = 0
    for step in range(160):
        if step < 110 and rng.random() < 0.5:
            for _ in range(rng.choice((1, 1, 4))):
                arrive(rng, scheduler, number)
                number += 1
        if scheduler.requests and rng.random() < 0.1:
            scheduler.finish_requests(rng.choice(list(scheduler.requests)), RequestStatus.FINISHED_ABORTED)
        if isinstance(driver, LaneDriver) and jobs and rng.random() < 0.4:
            (driver.fail if rng.random() < 0.2 else driver.end)(rng.choice(list(jobs)))
        if rng.random() < 0.03:
            scheduler.reset_prefix_cache(reset_running_requests=not lanes and rng.random() < 0.5)
        driver.step()
        assert scheduler.integrity.faults() == [], f"after step {step}"
    for _ in range(4000):
        if not scheduler.requests and not driver.in_flight:
            break
        if isinstance(driver, LaneDriver):
            driver.end(*jobs)
        driver.step()
    assert not scheduler.requests
    while driver.in_flight:
        driver.finish()
    assert scheduler.integrity.faults() == []
    assert scheduler.kv_cache_manager.usage == 0.0
    assert number > 30
