"""Retention on vLLM's real scheduler without a model: whose KV blocks stay, and that nobody is refused because of them."""

import random
from itertools import count
from typing import Any

import pytest
import torch
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.request import RequestStatus

from tests.support.log_messages import log_messages
from tests.support.schedulers import Clock, Driver, make_request, make_scheduler, serve
from vllm_agentserve.policy.waiting import HELD
from vllm_agentserve.scheduler.features import load, retention
from vllm_agentserve.scheduler.features.load import Load
from vllm_agentserve.scheduler.features.retention import Retain
from vllm_agentserve.vllm_compat import scheduler as compat
from vllm_agentserve.vllm_compat.free_blocks import blocks_of, retention_obstacle


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retention, "perf_counter", clock)
    monkeypatch.setattr(load, "perf_counter", clock)
    return clock


def started(num_blocks: int = 129, asynchronous: bool = False, **options: Any) -> tuple[Any, Driver, Retain]:
    """A KV cache of 2048 tokens."""
    given = {"mode": "time-sliced", "kv_retain": True, "load_control": False, "tpot_slo_ms": 10_000, **options}
    given.setdefault("first_chunk_tokens", 4096)
    scheduler: Any = make_scheduler(options=given, num_blocks=num_blocks, asynchronous=asynchronous)
    (retain,) = [one for one in scheduler._events.features if isinstance(one, Retain)]
    return scheduler, Driver(scheduler, depth=2 if asynchronous else 1), retain


def prompt(name: str, tokens: int) -> list[int]:
    return [(sum(map(ord, name)) * 131 + token) % 4000 for token in range(tokens)]


def turn(scheduler: Any, name: str, number: int, tokens: int = 400, **hints: Any) -> Any:
    """A call of the program `name`, whose context grows by 16 tokens a turn."""
    request = make_request(
        f"{name}-{number}", prompt(name, tokens + 16 * number), max_tokens=8, session=name, hints=hints or None
    )
    scheduler.add_request(request)
    return request


def learned(scheduler: Any, driver: Driver, clock: Clock, turns: int = 4, **hints: Any) -> None:
    """The programs `a` and `b` have come back several times, half a second after each answer."""
    for number in range(turns):
        for name in "ab":
            turn(scheduler, name, number, **(hints if number == turns - 1 else {}))
        serve(scheduler, driver, clock)
        clock.now += 0.5


def one_shots(scheduler: Any, driver: Driver, clock: Clock, number: int = 20) -> None:
    """So many prompts that nobody goes on from, of a sixth of the cache each; all in a tenth of a second."""
    began = clock.now
    for index in range(number):
        name = f"one-shot {began} {index}"
        scheduler.add_request(make_request(name, prompt(name, 330), max_tokens=4))
        serve(scheduler, driver, clock)
        clock.now = began + 0.1 * index / number


def cached(scheduler: Any, name: str, tokens: int = 400) -> int:
    return compat.cached_prefix_tokens(scheduler, make_request("look", prompt(name, tokens), session=name))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_program_keeps_its_blocks_while_others_flow_through(clock: Clock, asynchronous: bool) -> None:
    scheduler, driver, retain = started(asynchronous=asynchronous)
    learned(scheduler, driver, clock)
    kept = cached(scheduler, "a"), cached(scheduler, "b")
    assert kept == (384, 384)
    one_shots(scheduler, driver, clock, 10)
    assert (cached(scheduler, "a"), cached(scheduler, "b")) == kept
    report = scheduler.report()
    assert report["retention_programs"] == 2
    assert report["retention_blocks"] == retain.retention.blocks >= 2 * 28
    assert "retention_broken_blocks" not in report
    turn(scheduler, "a", 4)
    driver.step()
    assert scheduler.calls["a-4"].cached_tokens == 400 + 16 * 3


def test_without_the_option_the_same_one_shots_push_them_out(clock: Clock) -> None:
    scheduler: Any = make_scheduler(options={"mode": "time-sliced", "load_control": False}, num_blocks=129)
    driver = Driver(scheduler)
    learned(scheduler, driver, clock)
    assert type(scheduler.kv_cache_manager.block_pool.free_block_queue) is FreeKVCacheBlockQueue
    one_shots(scheduler, driver, clock, 10)
    assert (cached(scheduler, "a"), cached(scheduler, "b")) == (0, 0)


def test_a_call_that_is_said_to_be_the_last_lets_go(clock: Clock) -> None:
    scheduler, driver, retain = started()
    learned(scheduler, driver, clock)
    turn(scheduler, "a", 4, agent_last=True)
    serve(scheduler, driver, clock)
    assert [*retain.ledger.segments] == ["session b"]
    one_shots(scheduler, driver, clock, 10)
    assert cached(scheduler, "a") == 0
    assert cached(scheduler, "b") == 384


def test_one_shot_prompts_are_not_kept(clock: Clock) -> None:
    scheduler, driver, retain = started()
    one_shots(scheduler, driver, clock, 30)
    assert not retain.ledger.segments
    assert retain.retention.blocks == 0


def test_who_stays_away_is_kept_no_longer(clock: Clock) -> None:
    scheduler, driver, retain = started()
    learned(scheduler, driver, clock, turns=12)
    assert len(retain.retention) == 2
    clock.now += 600.0
    one_shots(scheduler, driver, clock, 1)
    assert not retain.ledger.segments


def test_a_prompt_of_the_whole_cache_gets_the_kept_blocks(clock: Clock) -> None:
    scheduler, driver, retain = started()
    learned(scheduler, driver, clock)
    assert retain.retention.blocks > 50
    scheduler.add_request(make_request("large", prompt("large", 2000), max_tokens=4))
    assert driver.step() == {"large": 2000}
    assert scheduler.report()["retention_broken_blocks"] >= 50
    serve(scheduler, driver, clock)
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 128


def test_a_running_request_that_grows_is_not_preempted_because_of_kept_blocks(clock: Clock) -> None:
    scheduler, driver, retain = started()
    learned(scheduler, driver, clock)
    scheduler.add_request(make_request("grows", prompt("grows", 1000), max_tokens=900))
    while scheduler.requests:
        clock.now += 0.001
        driver.step()
        if scheduler.requests:
            assert scheduler.requests["grows"].num_preemptions == 0
    assert retain.ledger.broken > 0
    assert scheduler.integrity.faults() == []


def crowded(clock: Clock, **options: Any) -> tuple[Any, Driver, Retain]:
    """Two programs are kept, with 56 of 128 blocks; a call with 38 blocks and more decodes."""
    scheduler, driver, retain = started(**options)
    learned(scheduler, driver, clock)
    scheduler.add_request(make_request("decodes", prompt("other", 600), max_tokens=180))
    for _ in range(4):
        driver.step()
    assert len(scheduler.running) == 1
    assert retain.retention.blocks == 56
    return scheduler, driver, retain


def steps_until_admitted(scheduler: Any, driver: Driver, clock: Clock, name: str, limit: int = 300) -> int:
    for step in range(limit):
        if scheduler.calls[name].cached_tokens is not None:
            return step
        clock.now += 0.001
        driver.step()
    raise AssertionError(f"{name} was not admitted")


def test_who_has_no_context_waits_for_blocks_that_are_not_kept(clock: Clock) -> None:
    scheduler, driver, retain = crowded(clock)
    scheduler.add_request(make_request("new", prompt("new", 700), max_tokens=4))
    for _ in range(20):
        clock.now += 0.001
        driver.step()
    assert scheduler.calls["new"].cached_tokens is None
    assert retain.ledger.broken == 0
    # Who comes back to its context does not.
    turn(scheduler, "a", 4)
    assert steps_until_admitted(scheduler, driver, clock, "a-4") <= 2
    assert scheduler.calls["a-4"].cached_tokens == 400 + 16 * 3
    # Nor who needs no more than there is.
    scheduler.add_request(make_request("short", prompt("short", 100), max_tokens=4))
    scheduler.finish_requests(["new"], RequestStatus.FINISHED_ABORTED)
    assert steps_until_admitted(scheduler, driver, clock, "short") <= 2
    serve(scheduler, driver, clock)
    assert scheduler.kv_cache_manager.watermark_blocks == 0


def test_nobody_waits_for_longer_than_the_bound(clock: Clock) -> None:
    scheduler, driver, retain = crowded(clock, max_bypass_steps=30)
    scheduler.add_request(make_request("new", prompt("new", 700), max_tokens=4))
    assert 25 <= steps_until_admitted(scheduler, driver, clock, "new") <= 35
    assert "decodes" in scheduler.calls
    assert retain.ledger.broken > 0


def test_nobody_waits_where_nothing_runs(clock: Clock) -> None:
    scheduler, driver, _ = crowded(clock)
    scheduler.add_request(make_request("new", prompt("new", 700), max_tokens=4))
    driver.step()
    assert scheduler.calls["new"].cached_tokens is None
    scheduler.finish_requests(["decodes"], RequestStatus.FINISHED_ABORTED)
    assert steps_until_admitted(scheduler, driver, clock, "new") <= 2


def test_others_go_before_who_waits_for_blocks_that_are_not_kept(clock: Clock) -> None:
    """Also a program that comes back with a prompt too long for a resume prefill, and so stands in line with the cold ones."""
    scheduler, driver, retain = crowded(clock)
    scheduler.add_request(make_request("new", prompt("new", 700), max_tokens=4))
    driver.step()
    scheduler.engine_policy.controller.resume_tokens = 32
    scheduler.add_request(make_request("a-4", prompt("a", 560), max_tokens=8, session="a"))
    assert steps_until_admitted(scheduler, driver, clock, "a-4") <= 3
    scheduler.add_request(make_request("short", prompt("short", 100), max_tokens=4))
    assert steps_until_admitted(scheduler, driver, clock, "short") <= 3
    assert scheduler.calls["new"].cached_tokens is None
    assert retain.ledger.broken == 0
    assert steps_until_admitted(scheduler, driver, clock, "new") <= 64
    serve(scheduler, driver, clock)


def test_blocks_of_its_own_program_keep_nobody_waiting(clock: Clock) -> None:
    """Its client has written the history anew."""
    scheduler, driver, _ = crowded(clock)
    scheduler.add_request(make_request("a-4", prompt("anew", 700), max_tokens=8, session="a"))
    assert steps_until_admitted(scheduler, driver, clock, "a-4") <= 2
    serve(scheduler, driver, clock)


def test_who_was_preempted_does_not_wait_for_blocks_that_are_not_kept(clock: Clock) -> None:
    """It goes first, so all others would wait behind it; and no bound ends its wait."""
    scheduler, driver, retain = crowded(clock)
    for name in "ab":
        scheduler.add_request(make_request(f"{name}-4", prompt(name, 464), max_tokens=60, session=name))
    driver.step()
    scheduler.add_request(make_request("preempted", prompt("preempted", 420), max_tokens=200))
    preempted = scheduler.requests["preempted"]
    while not preempted.num_preemptions:
        clock.now += 0.001
        driver.step()
    pool = scheduler.kv_cache_manager.block_pool
    pool.evict_blocks({block.block_id for block in pool.free_block_queue.get_all_free_blocks()})
    while "a-4" in scheduler.requests or "b-4" in scheduler.requests:
        clock.now += 0.001
        driver.step()
    assert len(retain.retention) == 2
    clock.now += 0.001
    driver.step()
    assert preempted.status is RequestStatus.RUNNING
    assert "decodes" in scheduler.requests
    serve(scheduler, driver, clock)


def test_who_is_kept_as_another_leaves_counts_the_blocks_they_share(clock: Clock) -> None:
    scheduler, driver, retain = started()
    shared = prompt("system", 64)
    for number in range(4):
        for name in "ab":
            tokens = shared + prompt(name, 100 + 16 * number)
            scheduler.add_request(make_request(f"{name}-{number}", tokens, max_tokens=8, session=name))
        serve(scheduler, driver, clock)
        clock.now += 0.5
    assert len(retain.retention) == 2
    scheduler.add_request(make_request("c-0", shared + prompt("c", 100), max_tokens=20, session="c"))
    driver.step()
    # In steps of decodes only nobody asks who has stayed away for too long.
    clock.now += 600.0
    while scheduler.requests:
        driver.step()
    assert [*retain.ledger.segments] == ["session c"]
    (context,) = [segment.context for segment in retain.ledger.segments.values()]
    assert retain.retention.blocks == len(context)


@pytest.mark.parametrize("policy", ["fcfs", "plas"])
def test_nobody_waits_for_more_than_64_steps_whatever_the_order(clock: Clock, policy: str) -> None:
    """With levels of programs `max_bypass_steps` is 4096, and steps take some 20 ms."""
    scheduler, driver, retain = crowded(clock, policy=policy)
    scheduler.add_request(make_request("batch", prompt("batch", 900), max_tokens=4, hints={"agent_class": "batch"}))
    driver.step()
    scheduler.add_request(make_request("new", prompt("new", 700), max_tokens=4))
    assert 60 <= steps_until_admitted(scheduler, driver, clock, "new") <= 68
    assert "decodes" in scheduler.calls
    assert scheduler.calls["batch"].cached_tokens is None
    assert retain._passed.keys() <= {scheduler.calls["batch"]}
    serve(scheduler, driver, clock)
    assert not retain._passed


CRITICAL = {"kv_retain": False, "kv_reserve_share": 0.3}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_only_critical_programs_keep_their_blocks(clock: Clock, asynchronous: bool) -> None:
    scheduler, driver, retain = started(asynchronous=asynchronous, **CRITICAL)
    learned(scheduler, driver, clock)
    assert not retain.ledger.segments
    turn(scheduler, "a", 4, agent_critical=True)
    turn(scheduler, "b", 4)
    serve(scheduler, driver, clock)
    assert [*retain.ledger.segments] == ["session a"]
    one_shots(scheduler, driver, clock, 10)
    assert cached(scheduler, "a", 464) == 448
    assert cached(scheduler, "b", 464) == 0
    assert scheduler.report()["retention_programs"] == 1
    assert scheduler.integrity.faults() == []


def reserving(clock: Clock, **options: Any) -> tuple[Any, Driver, Retain]:
    """A call with 38 of 128 blocks decodes, another one with 63 too; 27 are free, and 38 are reserved for critical ones."""
    scheduler, driver, retain = started(**CRITICAL | options)
    retain.space.share = 0.3
    retain.space.adapt(clock.now, 64)
    for name, tokens in (("first", 600), ("second", 1000)):
        scheduler.add_request(make_request(name, prompt(name, tokens), max_tokens=180))
        driver.step()
    driver.step()
    assert len(scheduler.running) == 2
    return scheduler, driver, retain


def test_a_critical_call_gets_reserved_blocks_and_another_one_waits(clock: Clock) -> None:
    scheduler, driver, retain = reserving(clock)
    turn(scheduler, "c", 0, 100, agent_critical=True)
    scheduler.add_request(make_request("new", prompt("new", 100), max_tokens=4))
    assert steps_until_admitted(scheduler, driver, clock, "c-0") <= 2
    assert scheduler.calls["new"].cached_tokens is None
    report = scheduler.report()
    # The report is of the step in which it began.
    assert (report["reserve_ratio"], report["reserved_blocks"]) == (pytest.approx(0.3), 38)
    clock.now += 0.001
    driver.step()
    assert scheduler.report()["reserved_blocks"] == 38 - 7
    # When no critical call is left nothing is reserved: nobody came back so far, so its context is not kept.
    while "c-0" in scheduler.requests:
        clock.now += 0.001
        driver.step()
    assert steps_until_admitted(scheduler, driver, clock, "new") <= 2
    assert scheduler.integrity.faults() == []
    serve(scheduler, driver, clock)
    assert scheduler.kv_cache_manager.watermark_blocks == 0


def test_nobody_waits_for_reserved_blocks_for_longer_than_the_bound(clock: Clock) -> None:
    scheduler, driver, _ = reserving(clock, max_bypass_steps=30)
    scheduler.add_request(make_request("critical", prompt("c", 100), max_tokens=160, hints={"agent_critical": True}))
    scheduler.add_request(make_request("new", prompt("new", 100), max_tokens=4))
    assert 25 <= steps_until_admitted(scheduler, driver, clock, "new") <= 35
    assert "critical" in scheduler.requests


def test_without_critical_calls_nothing_is_reserved(clock: Clock) -> None:
    scheduler, driver, _ = reserving(clock)
    scheduler.add_request(make_request("new", prompt("new", 300), max_tokens=4))
    assert steps_until_admitted(scheduler, driver, clock, "new") <= 2
    assert scheduler.report()["reserved_blocks"] == 0


def test_critical_calls_that_are_aborted_reserve_nothing(clock: Clock) -> None:
    scheduler, driver, retain = reserving(clock)
    for index in range(3):
        hints = {"agent_critical": True}
        scheduler.add_request(make_request(f"c{index}", prompt(f"c{index}", 100), max_tokens=160, hints=hints))
    driver.step()
    scheduler.finish_requests(["c0", "c1", "c2"], RequestStatus.FINISHED_ABORTED)
    assert not retain._critical
    assert not retain._critical_begun
    scheduler.add_request(make_request("new", prompt("new", 300), max_tokens=4))
    assert steps_until_admitted(scheduler, driver, clock, "new") <= 2


def test_blocks_that_critical_calls_share_count_once(clock: Clock) -> None:
    """Four calls that go on from one context, as parts of one application do, have 32 blocks: the reserve is 6 more."""
    scheduler, driver, retain = started(**CRITICAL)
    retain.space.share = 0.3
    retain.space.adapt(clock.now, 64)
    for index in range(4):
        tokens = prompt("shared", 320) + prompt(f"{index} alone", 20)
        hints = {"agent_critical": True}
        scheduler.add_request(make_request(f"c{index}", tokens, max_tokens=100, hints=hints))
        driver.step()

    def left() -> int:
        """Of the reserve, counted block by block."""
        manager = scheduler.kv_cache_manager
        has = {block for name in scheduler.requests for block in manager.get_block_ids(name)[0]}
        scheduler.add_request(make_request("looks", prompt("looks", 16), max_tokens=1))
        driver.step()
        return 38 - len(has)

    assert left() == scheduler.report()["reserved_blocks"] > 0
    scheduler.finish_requests(["c0"], RequestStatus.FINISHED_ABORTED)
    assert left() == scheduler.report()["reserved_blocks"] > 0
    compat.preempt(scheduler, scheduler.requests["c1"])
    assert scheduler.integrity.faults() == []
    assert left() == scheduler.report()["reserved_blocks"] > 0
    serve(scheduler, driver, clock)


def test_nothing_is_reserved_for_calls_of_class_batch(clock: Clock) -> None:
    """Every interactive call goes before them."""
    scheduler, driver, retain = reserving(clock)
    hints = {"agent_critical": True, "agent_class": "batch"}
    scheduler.add_request(make_request("batch", prompt("batch", 100), max_tokens=160, hints=hints))
    assert steps_until_admitted(scheduler, driver, clock, "batch") <= 2
    scheduler.add_request(make_request("new", prompt("new", 100), max_tokens=4))
    assert steps_until_admitted(scheduler, driver, clock, "new") <= 2
    assert "batch" in scheduler.requests


def test_blocks_are_reserved_at_once_beside_thousands_of_held_critical_calls(clock: Clock) -> None:
    scheduler, driver, retain = reserving(clock)
    waiting, hints = scheduler.engine_policy.waiting, {"agent_critical": True}
    held = [f"held {index}" for index in range(300)]
    for name in held:
        scheduler.add_request(make_request(name, prompt(name, 20), max_tokens=2, hints=hints))
    waiting.park({scheduler.calls[name]: HELD for name in held})
    retain.before_step(2, 1600)
    assert (waiting.held_critical, retain._reserved) == (300, 0)
    scheduler.add_request(make_request("c", prompt("c", 100), max_tokens=160, hints=hints))
    retain.before_step(2, 1600)
    assert retain._reserved == 38
    assert scheduler.integrity.faults() == []
    scheduler.finish_requests(["c", *held[:100]], RequestStatus.FINISHED_ABORTED)
    retain.before_step(2, 1600)
    assert (waiting.held_critical, retain._reserved) == (200, 0)
    waiting.release(lambda call: True)
    assert waiting.held_critical == 0
    serve(scheduler, driver, clock)
    assert scheduler.integrity.faults() == []


def test_what_critical_calls_share_is_not_counted_anew_while_another_one_waits(clock: Clock) -> None:
    """Of all their blocks; that would be done in every step."""
    scheduler, driver, retain = started(**CRITICAL)
    hints = {"agent_critical": True}
    for name, tokens in (("a", 900), ("b", 900)):
        scheduler.add_request(make_request(name, prompt(name, tokens), max_tokens=100, hints=hints))
        driver.step()
    driver.step()
    assert retain._critical_in_use() >= 2 * 57
    scheduler.add_request(make_request("waits", prompt("waits", 900), max_tokens=2, hints=hints))
    for _ in range(3):
        driver.step()
        assert scheduler.calls["waits"].cached_tokens is None
        assert scheduler.calls["waits"] not in retain._critical_begun
        assert retain._shared is not None
    serve(scheduler, driver, clock)


@pytest.mark.parametrize(("restored", "kept"), [(0, 0), (80, 38)])
def test_a_context_that_comes_back_takes_no_reserved_blocks(clock: Clock, restored: int, kept: int) -> None:
    """Ninety tokens of a hundred are found. Those that are in host memory need blocks as if they were computed."""
    scheduler, driver, retain = reserving(clock)
    scheduler.add_request(make_request("critical", prompt("c", 100), max_tokens=160, hints={"agent_critical": True}))
    retain.before_step(2, 1600)
    scheduler.add_request(make_request("new", prompt("new", 100), max_tokens=4))
    retain.asked(scheduler.calls["new"], 90, restored)
    assert scheduler.kv_cache_manager.watermark_blocks == kept
    retain.after_schedule()
    serve(scheduler, driver, clock)


def test_what_was_reserved_is_not_reported_any_more(clock: Clock) -> None:
    """The last step of prompts was before the last critical call ended."""
    scheduler, driver, _ = reserving(clock)
    scheduler.add_request(make_request("c", prompt("c", 100), max_tokens=8, hints={"agent_critical": True}))
    driver.step()
    scheduler.add_request(make_request("new", prompt("new", 16), max_tokens=4))
    driver.step()
    assert scheduler.report()["reserved_blocks"] == 38 - 7
    serve(scheduler, driver, clock)
    report = scheduler.report()
    assert (report["reserve_ratio"], report["reserved_blocks"]) == (0.0, 0.0)


def test_nothing_is_reserved_for_calls_that_load_control_holds(clock: Clock) -> None:
    """Others would wait for blocks that nobody may have."""
    scheduler, driver, _ = reserving(clock)
    waiting = scheduler.engine_policy.waiting
    scheduler.add_request(make_request("c", prompt("c", 100), max_tokens=160, hints={"agent_critical": True}))
    waiting.park({scheduler.calls["c"]: HELD})
    scheduler.add_request(make_request("new", prompt("new", 100), max_tokens=4))
    assert steps_until_admitted(scheduler, driver, clock, "new") <= 2
    assert scheduler.report()["reserved_blocks"] == 0
    waiting.release(lambda call: True)
    assert steps_until_admitted(scheduler, driver, clock, "c") <= 2
    assert scheduler.report()["reserved_blocks"] > 0


def test_headroom_that_is_configured_stays(clock: Clock) -> None:
    scheduler, driver, _ = started()
    compat.keep_headroom(scheduler, 7)
    (retain,) = [one for one in scheduler._events.features if isinstance(one, Retain)]
    retain._headroom = compat.headroom_blocks(scheduler)
    learned(scheduler, driver, clock)
    assert scheduler.kv_cache_manager.watermark_blocks == 7


def test_without_the_option_nobody_waits(clock: Clock) -> None:
    scheduler: Any = make_scheduler(options={"mode": "time-sliced", "load_control": False}, num_blocks=129)
    driver = Driver(scheduler)
    learned(scheduler, driver, clock)
    scheduler.add_request(make_request("decodes", prompt("other", 600), max_tokens=180))
    driver.step()
    scheduler.add_request(make_request("new", prompt("new", 700), max_tokens=4))
    assert steps_until_admitted(scheduler, driver, clock, "new") <= 2


def test_the_prefix_cache_can_be_reset(clock: Clock) -> None:
    scheduler, driver, retain = started()
    learned(scheduler, driver, clock)
    assert scheduler.reset_prefix_cache()
    assert not retain.ledger.segments
    assert retain.retention.blocks == 0
    assert cached(scheduler, "a") == 0
    assert scheduler.integrity.faults() == []
    learned(scheduler, driver, clock)
    assert len(retain.ledger.segments) == 2


def test_a_reset_that_fails_keeps_what_is_kept(clock: Clock) -> None:
    scheduler, driver, retain = started()
    learned(scheduler, driver, clock)
    scheduler.add_request(make_request("runs", 100))
    driver.step()
    assert not scheduler.reset_prefix_cache()
    assert len(retain.ledger.segments) == 2
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    assert not retain.ledger.segments
    assert scheduler.integrity.faults() == []


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_preempted_call_of_a_kept_program(clock: Clock, asynchronous: bool) -> None:
    """Its old context is kept again, and it goes on from there."""
    scheduler, driver, retain = started(asynchronous=asynchronous)
    learned(scheduler, driver, clock)
    turn(scheduler, "a", 4)
    driver.step()
    driver.step()
    compat.preempt(scheduler, scheduler.requests["a-4"])
    assert scheduler.integrity.faults() == []
    serve(scheduler, driver, clock)
    assert cached(scheduler, "a") == 384
    assert "session a" in retain.ledger.segments


def test_aborted_calls_leave_the_program_kept(clock: Clock) -> None:
    scheduler, driver, retain = started()
    learned(scheduler, driver, clock)
    turn(scheduler, "a", 4)
    scheduler.finish_requests("a-4", RequestStatus.FINISHED_ABORTED)
    assert "session a" in retain.ledger.segments
    turn(scheduler, "a", 5)
    driver.step()
    scheduler.finish_requests("a-5", RequestStatus.FINISHED_ABORTED)
    while driver.in_flight:
        driver.finish()
    assert scheduler.integrity.faults() == []
    one_shots(scheduler, driver, clock, 1)
    assert cached(scheduler, "a") == 384


def test_sub_agents_have_contexts_of_their_own(clock: Clock) -> None:
    scheduler, driver, retain = started(num_blocks=257)
    learned(scheduler, driver, clock)
    for number in range(2):
        turn(scheduler, "child", number, 200, agent_parent="a")
        serve(scheduler, driver, clock)
    assert "session a" in retain.ledger.segments
    assert "session a thread child" in retain.ledger.segments
    turn(scheduler, "child", 2, 200, agent_parent="a", agent_last=True)
    serve(scheduler, driver, clock)
    assert "session a" in retain.ledger.segments
    assert "session a thread child" not in retain.ledger.segments


def test_with_load_control_there_is_one_record_of_returns(clock: Clock) -> None:
    scheduler, driver, retain = started(load_control=True)
    (control,) = [one for one in scheduler._events.features if isinstance(one, Load)]
    learned(scheduler, driver, clock)
    assert retain.retention.returns is control.control.returns
    assert retain.retention.returns.gaps.samples == pytest.approx(6.0, abs=0.5)
    assert len(retain.retention) == 2


def obstacle(**options: Any) -> list[str]:
    with log_messages() as messages:
        scheduler: Any = make_scheduler(options={"mode": "time-sliced", "kv_retain": True}, **options)
    assert not [one for one in scheduler._events.features if isinstance(one, Retain)]
    assert type(scheduler.kv_cache_manager.block_pool.free_block_queue) is FreeKVCacheBlockQueue
    return [message for message in messages if "are not kept" in message]


def test_where_it_cannot_be_the_log_says_why() -> None:
    (said,) = obstacle(prefix_caching=False)
    assert said.endswith("prefix caching is off.")
    (said,) = obstacle(policy="priority")
    assert "vLLM's order" in said


def test_layers_that_differ_are_an_obstacle() -> None:
    scheduler, *_ = started()
    assert retention_obstacle(scheduler) == "another part has replaced vLLM's queue of free KV blocks"
    full = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=1, dtype=torch.float32)
    window = SlidingWindowSpec(block_size=16, num_kv_heads=1, head_size=1, dtype=torch.float32, sliding_window=64)
    groups = [KVCacheGroupSpec(["full"], full), KVCacheGroupSpec(["window"], window)]
    scheduler.kv_cache_config = KVCacheConfig(129, [], groups)
    assert retention_obstacle(scheduler) == "the layers of this model differ in what they keep in the KV cache"


def test_a_fault_is_seen(clock: Clock) -> None:
    scheduler, driver, retain = started()
    learned(scheduler, driver, clock)
    retain.retention.blocks += 1
    retain.ledger.segments["nobody"] = retain.ledger.segments["session a"]
    faults = scheduler.integrity.faults()
    assert any("are said to be kept" in fault for fault in faults)
    assert any("'nobody'" in fault for fault in faults)
    retain._running["nobody"] += 1
    assert any("counted, by program" in fault for fault in scheduler.integrity.faults())


class History:
    """Random calls of programs, sub-agents and one-shot prompts in a small KV cache, with aborts, preemptions and resets."""

    def __init__(self, seed: int, clock: Clock, asynchronous: bool, critical: bool = False) -> None:
        self.rng = random.Random(seed)
        self.clock = clock
        self.scheduler, self.driver, self.retain = started(
            num_blocks=self.rng.choice([40, 80, 160]),
            asynchronous=asynchronous,
            load_control=self.rng.random() < 0.3,
            kv_reserve_share=0.6 * critical,
        )
        self.critical = critical
        self.contexts: dict[str, int] = {}
        self.numbers = count()

    def hints(self) -> dict[str, Any]:
        """Of a call: half of them are critical, and some of class batch."""
        if not self.critical:
            return {}
        classes = {"agent_class": "batch"} if self.rng.random() < 0.2 else {}
        return classes | {"agent_critical": self.rng.random() < 0.5}

    def arrives(self) -> None:
        rng, number = self.rng, next(self.numbers)
        if rng.random() < 0.3:
            text = prompt("system", 64) + prompt(f"one-shot {number}", rng.randrange(1, 200))
            most = rng.randrange(1, 20)
            request = make_request(f"one-shot-{number}", text, max_tokens=most, hints=self.hints() or None)
            self.scheduler.add_request(request)
            return
        name = rng.choice("abcdefgh")
        tokens = self.contexts.get(name, 0) + rng.randrange(1, 60)
        if tokens > 400 or rng.random() < 0.05:
            tokens = rng.randrange(20, 100)
        self.contexts[name] = tokens
        hints: dict[str, Any] = {"agent_last": True} if rng.random() < 0.1 else {}
        hints |= self.hints()
        if name in "gh":
            hints["agent_parent"] = "a"
        text = prompt("system", 64) + prompt(name, tokens)
        request = make_request(
            f"{name}-{number}", text, max_tokens=rng.randrange(1, 30), session=name, hints=hints or None
        )
        self.scheduler.add_request(request)

    def disturbs(self) -> None:
        scheduler, rng, kind = self.scheduler, self.rng, self.rng.random()
        if kind < 0.04 and scheduler.requests:
            name = rng.choice(sorted(scheduler.requests))
            scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        elif kind < 0.06:
            able = [one for one in scheduler.running if compat.may_be_preempted(scheduler, one)]
            if able and not self.driver.in_flight:
                compat.preempt(scheduler, rng.choice(able))
        elif kind < 0.07 and not self.driver.in_flight:
            scheduler.reset_prefix_cache(reset_running_requests=rng.random() < 0.5)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("critical", [False, True], ids=["nobody", "critical"])
@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_lost_whatever_happens(clock: Clock, seed: int, critical: bool, asynchronous: bool) -> None:
    history = History(seed, clock, asynchronous, critical)
    retain = history.retain
    scheduler, rng = history.scheduler, history.rng
    kept = 0
    for step in range(200):
        clock.now += rng.choice([0.01, 0.02, 0.5])
        if rng.random() < 0.4 and len(scheduler.requests) < 12:
            history.arrives()
        history.disturbs()
        history.driver.step()
        assert step % 3 or scheduler.integrity.faults() == []
        kept = max(kept, len(retain.ledger.segments))
        held = [blocks_of(scheduler, call.request) for call in retain._critical_begun]
        assert retain._critical_in_use() == len({block.block_id for blocks in held for block in blocks})
    for _ in range(2000):
        if not scheduler.requests:
            break
        clock.now += 0.02
        history.driver.step()
    while history.driver.in_flight:
        history.driver.finish()
    assert not scheduler.requests
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert scheduler.integrity.faults() == []
    assert kept
    assert scheduler.reset_prefix_cache()
    assert len(pool.free_block_queue.get_all_free_blocks()) == pool.num_gpu_blocks - 1


def test_a_session_of_another_tenant_has_blocks_of_its_own(clock: Clock) -> None:
    scheduler, driver, retain = started()
    for number in range(5):
        for salt in ("one", "other"):
            tokens = prompt("a", 400 + 16 * number)
            request = make_request(f"{salt}-{number}", tokens, max_tokens=8, session="a", cache_salt=salt)
            scheduler.add_request(request)
            serve(scheduler, driver, clock)
        clock.now += 0.5
    assert len(retain.retention) == len(retain.ledger.segments) == 2
    assert all(len(segment.context) == 29 for segment in retain.ledger.segments.values())
    (first, other) = (segment.context for segment in retain.ledger.segments.values())
    assert not {block.block_id for block in first} & {block.block_id for block in other}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_streamed_session_is_kept_like_any_other_when_it_has_ended(clock: Clock, asynchronous: bool) -> None:
    scheduler, driver, retain = started(asynchronous=asynchronous, load_control=True)
    learned(scheduler, driver, clock)
    for _ in range(3):
        for part in range(2):
            tokens = prompt(f"s {part}", 200)
            request = make_request("s", tokens, max_tokens=4, session="s", resumable=True)
            scheduler.add_request(request)
            for _ in range(12):
                clock.now += 0.02
                driver.step()
            assert scheduler.num_waiting_for_streaming_input == 1
            assert scheduler.integrity.faults() == []
        scheduler.finish_requests("s", RequestStatus.FINISHED_ABORTED)
        serve(scheduler, driver, clock)
        clock.now += 0.5
    assert "session s" in retain.retention
