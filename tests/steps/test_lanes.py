"""The lane's connector on vLLM's real scheduler, without a model: step tables of everything that can become of a prompt."""

import pytest
from vllm.v1.request import RequestStatus

from tests.support.lane_driver import PARKED, LaneReport, Slot, both, counts, started, status
from tests.support.schedulers import BLOCK, Clock, make_request
from vllm_agentserve.scheduler.features import retention
from vllm_agentserve.scheduler.features.retention import Retain


@both
def test_admitted_computed_and_handed_over(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous)
    scheduler.add_request(make_request("cold", 600))
    assert driver.step() == {"stream": 1}
    driver.step()
    assert status(scheduler, "cold") is PARKED
    job = driver.jobs["cold"]
    assert (job.start, job.end, len(job.token_ids), len(job.block_ids[0]), job.resume) == (0, 599, 600, 38, False)
    for _ in range(5):
        assert driver.step() == {"stream": 1}
    driver.end("cold")
    assert driver.until("cold")[-1] == {"stream": 1, "cold": 1}
    assert driver.step() == {"stream": 1, "cold": 1}
    done = counts(scheduler)
    assert (done["lane_requests"], done["lane_tokens"], done["lane_forced_requests"]) == (1, 599, 1)
    assert done["cold_prefill_requests"] == 2
    assert not scheduler._lane.busy


@both
def test_published_only_when_written(asynchronous: bool) -> None:
    """Nobody finds the blocks of a prompt in the prefix cache while the lane fills them."""
    scheduler, driver = started(asynchronous)
    prompt = list(range(40 * BLOCK))
    scheduler.add_request(make_request("cold", prompt))
    driver.step()
    driver.step()
    manager = scheduler.kv_cache_manager
    look = make_request("look", [*prompt, 1])
    assert manager.coordinator.find_longest_cache_hit(look.block_hashes, 40 * BLOCK)[1] == 0
    driver.end("cold")
    driver.until("cold")
    assert manager.coordinator.find_longest_cache_hit(look.block_hashes, 40 * BLOCK)[1] >= 39 * BLOCK


@both
def test_a_resume_begins_where_the_cache_ends(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous)
    prompt = list(range(40 * BLOCK))
    scheduler.add_request(make_request("turn-1", prompt, max_tokens=1))
    driver.step()
    driver.end("turn-1")
    driver.until("turn-1")
    scheduler.add_request(make_request("turn-2", [*prompt, *range(3000, 3200)]))
    driver.step()
    driver.step()
    job = driver.jobs["turn-2"]
    assert (job.start, job.end, job.resume) == (40 * BLOCK, 40 * BLOCK + 199, True)


@both
@pytest.mark.parametrize("session", ["known", None])
def test_a_job_has_the_phase_that_queue_and_metrics_see(asynchronous: bool, session: str | None) -> None:
    """A third of the context is cached: that is a resume prefill where the session is known, and else a cold one."""
    scheduler, driver = started(asynchronous)
    prompt = list(range(20 * BLOCK))
    scheduler.add_request(make_request("turn-1", prompt, max_tokens=1, session=session))
    driver.step()
    driver.end("turn-1")
    driver.until("turn-1")
    for _ in range(3):
        driver.step()
    scheduler.add_request(make_request("turn-2", [*prompt, *range(2000, 2000 + 40 * BLOCK)], session=session))
    driver.step()
    driver.step()
    assert driver.jobs["turn-2"].resume is (session is not None)
    driver.end("turn-2")
    driver.until("turn-2")
    driver.step()
    assert counts(scheduler).get("resume_prefill_requests", 0) == (session is not None)


@both
def test_a_job_carries_the_rank_of_its_call(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous)
    scheduler.add_request(make_request("batch", list(range(40 * BLOCK)), hints={"agent_class": "batch"}))
    driver.step()
    driver.step()
    assert driver.jobs["batch"].rank == (True, 0)


@both
def test_a_full_lane_holds_others_back(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous, options={"lane_max_requests": 1})
    for name in ("a", "b", "c"):
        scheduler.add_request(make_request(name, 400))
    for _ in range(4):
        assert driver.step() == {"stream": 1}
    assert list(driver.jobs) == ["a"]
    assert [status(scheduler, name) for name in "bc"] == [RequestStatus.WAITING] * 2
    usage = scheduler.kv_cache_manager.usage
    driver.end("a")
    driver.until("a")
    for _ in range(3):
        driver.step()
    assert list(driver.jobs) == ["b"]
    assert scheduler.kv_cache_manager.usage > usage


@both
def test_held_prompts_are_not_looked_at_again_and_again(asynchronous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty agents behind a busy lane cost a step nothing; they get their turns one by one, in order."""
    scheduler, driver = started(asynchronous, options={"lane_max_requests": 1})
    names = [f"agent-{n:02}" for n in range(30)]
    for name in names:
        scheduler.add_request(make_request(name, 400, max_tokens=1))
    driver.step()
    driver.step()
    looks = []
    matched = type(scheduler._lane.dispatch).matched
    monkeypatch.setattr(
        type(scheduler._lane.dispatch), "matched", lambda *given: looks.append(given[1].request_id) or matched(*given)
    )
    for _ in range(5):
        assert driver.step() == {"stream": 1}
    assert looks == []
    came = []
    while len(came) < 30:
        (name,) = driver.jobs
        came.append(name)
        driver.end(name)
        while name in driver.jobs or (len(came) < 30 and not driver.jobs):
            driver.step()
    assert came == names
    assert len(looks) < 100
    driver.step()
    assert len(scheduler.waiting) == 0


@both
def test_two_identical_prompts_are_computed_once(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous)
    prompt = list(range(40 * BLOCK))
    for name in ("a", "b"):
        scheduler.add_request(make_request(name, prompt))
    for _ in range(4):
        assert driver.step() == {"stream": 1}
    assert list(driver.jobs) == ["a"]
    driver.end("a")
    rows = driver.until("b")
    assert not driver.jobs
    assert rows[-1]["b"] == BLOCK  # all but the last block were found
    assert counts(scheduler)["lane_tokens"] == 40 * BLOCK - 1


@both
def test_a_prompt_that_shares_what_is_being_filled_waits_for_it(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous)
    system = list(range(40 * BLOCK))
    scheduler.add_request(make_request("a", [*system, *range(2000, 2100)]))
    scheduler.add_request(make_request("b", [*system, *range(3000, 3200)]))
    scheduler.add_request(make_request("other", 300))
    for _ in range(4):
        driver.step()
    assert set(driver.jobs) == {"a", "other"}
    driver.end("a")
    driver.until("a")
    driver.step()
    driver.step()
    assert driver.jobs["b"].start == 40 * BLOCK


@both
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_cancelled(asynchronous: bool, steps: int) -> None:
    """Its blocks stay the lane's until the lane has let go of them."""
    scheduler, driver = started(asynchronous)
    scheduler.add_request(make_request("cold", 600))
    for _ in range(steps):
        driver.step()
    scheduler.finish_requests("cold", RequestStatus.FINISHED_ABORTED)
    if steps:
        assert scheduler.kv_cache_manager.usage > 38 / 10_000
    for _ in range(6):
        assert driver.step() == {"stream": 1}
    assert not driver.jobs
    assert not scheduler._lane.busy
    assert not scheduler._lane.dispatch.filling
    assert set(scheduler.calls) == {"stream"}
    assert set(scheduler.requests) == {"stream"}
    scheduler.finish_requests("stream", RequestStatus.FINISHED_ABORTED)
    for _ in range(3):
        driver.step()
    assert scheduler.kv_cache_manager.usage == 0.0


@both
def test_failed_and_computed_again_in_steps(asynchronous: bool) -> None:
    scheduler, driver = started(asynchronous)
    scheduler.add_request(make_request("cold", 600))
    driver.step()
    driver.step()
    driver.fail("cold")
    rows = driver.until("cold")
    while scheduler.requests["cold"].num_computed_tokens < 600:
        rows.append(driver.step())
    assert sum(row.get("cold", 0) for row in rows) == 600
    assert all(row.get("stream") == 1 for row in rows)
    done = counts(scheduler)
    assert (done["lane_failed_requests"], done["step_lane_down_requests"]) == (1, 1)
    # Nothing more goes there until a lane says that it is ready.
    scheduler.add_request(make_request("next", 300))
    driver.until("next")
    driver.report = LaneReport((Slot(1, 1),))
    driver.step()
    driver.step()
    scheduler.add_request(make_request("after", 300))
    driver.step()
    driver.step()
    assert list(driver.jobs) == ["after"]


@both
def test_a_preempted_sequence_is_filled_again_by_the_lane(asynchronous: bool) -> None:
    """All it had, prompt and answer, but the last token, is one job."""
    scheduler, driver = started(asynchronous, num_blocks=50, options={"lane_min_tokens": 64})
    scheduler.add_request(make_request("b", 25 * BLOCK))
    driver.step()
    driver.step()
    driver.end("b")
    driver.until("b")
    scheduler.add_request(make_request("c", 10 * BLOCK))
    driver.step()
    driver.step()
    driver.end("c")
    driver.until("c")
    while not any(request.num_preemptions for request in scheduler.requests.values()):
        driver.step()
    victim = next(request for request in scheduler.requests.values() if request.num_preemptions)
    # The blocks it lost are still cached: taken by somebody else, they are not.
    rivals = [request for request in scheduler.requests.values() if request is not victim]
    for rival in rivals:
        if rival.request_id != "stream":
            scheduler.finish_requests(rival.request_id, RequestStatus.FINISHED_ABORTED)
    for block in range(1, 50):
        scheduler.kv_cache_manager.block_pool._maybe_evict_cached_block(
            scheduler.kv_cache_manager.block_pool.blocks[block]
        )
    for _ in range(4):
        driver.step()
    job = driver.jobs[victim.request_id]
    assert job.token_ids == list(victim.all_token_ids)
    assert job.end == victim.num_tokens - 1 > victim.num_prompt_tokens
    driver.end(victim.request_id)
    assert driver.until(victim.request_id)[-1][victim.request_id] == 1


@both
def test_a_prompt_for_the_lane_takes_no_blocks_that_are_reserved(asynchronous: bool) -> None:
    """A critical call has 7 of 128 blocks, and 69 more are reserved for such calls; a prompt of 63 would leave 56."""
    options = {"kv_reserve_share": 0.6, "load_control": False}
    scheduler, driver = started(asynchronous, num_blocks=129, options=options)
    (retain,) = [one for one in scheduler._events.features if isinstance(one, Retain)]
    retain.space.share = 0.6
    scheduler.add_request(make_request("critical", 100, max_tokens=160, hints={"agent_critical": True}))
    for _ in range(4):
        driver.step()
    assert retain._critical_in_use() >= 7
    scheduler.add_request(make_request("long", list(range(1000))))
    for _ in range(4):
        driver.step()
    assert status(scheduler, "long") is RequestStatus.WAITING
    assert "long" not in driver.jobs
    scheduler.finish_requests("critical", RequestStatus.FINISHED_ABORTED)
    for _ in range(3):
        driver.step()
    assert status(scheduler, "long") is PARKED
    assert scheduler.integrity.faults() == []


@both
def test_blocks_of_a_critical_prompt_in_the_lane_count_towards_the_reserve(asynchronous: bool) -> None:
    options = {"kv_reserve_share": 0.6, "load_control": False}
    scheduler, driver = started(asynchronous, num_blocks=129, options=options)
    (retain,) = [one for one in scheduler._events.features if isinstance(one, Retain)]
    scheduler.add_request(make_request("critical", 600, hints={"agent_critical": True}))
    for _ in range(3):
        driver.step()
    assert status(scheduler, "critical") is PARKED
    assert retain._critical_in_use() == 38
    driver.end("critical")
    driver.until("critical")
    assert retain._critical_in_use() >= 38
    assert scheduler.integrity.faults() == []


def test_kept_blocks_of_a_program_in_the_lane_are_in_use_and_keep_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A program comes back with 34 kept blocks and has 50 in the lane; 75 are free, and none of these is kept."""
    clock = Clock()
    monkeypatch.setattr(retention, "perf_counter", clock)
    options = {"kv_reserve_share": 0.3, "kv_retain": True, "load_control": False, "lane_max_requests": 4}
    scheduler, driver = started(False, num_blocks=129, options=options)
    (retain,) = [one for one in scheduler._events.features if isinstance(one, Retain)]

    def ask(name: str, number: int, tokens: int, **hints: bool) -> None:
        given = list(range(1000 * ord(name) % 3000, 1000 * ord(name) % 3000 + tokens))
        scheduler.add_request(make_request(f"{name}-{number}", given, max_tokens=4, session=name, hints=hints or None))

    for number in range(5):
        ask("p", number, 480 + 16 * number, agent_critical=True)
        while f"p-{number}" in scheduler.requests:
            clock.now += 0.02
            for job in [*driver.jobs]:
                driver.end(job)
            driver.step()
        clock.now += 0.5
    assert retain.retention.critical_blocks >= 30
    ask("p", 9, 800, agent_critical=True)
    for _ in range(3):
        clock.now += 0.02
        driver.step()
    assert status(scheduler, "p-9") is PARKED
    assert retain.retention.away_blocks(retain._running, None, critical=True) == 0
    ask("x", 0, 700)
    for _ in range(3):
        clock.now += 0.001
        driver.step()
    assert status(scheduler, "x-0") is PARKED
    assert scheduler.integrity.faults() == []
